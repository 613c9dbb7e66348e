"""Attention masks of packed batches: answers attend to their shared prompt, and prompt groups stay apart.

SDPA and eager attention take an additive 4-D mask; flex_attention takes a ``BlockMask``.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from irlfast.data.packing import PAD, Batch

BLOCK = 128  # tokens; flex_attention's default


def masks(model: Any, batch: Batch) -> Any:
    """Return the mask for all layers, or a mask for each kind of layer if the model has several kinds."""
    config = model.config.get_text_config()
    # The mask has the model's own dtype: torch's SDPA on a CPU accepts an fp32 mask with an fp64 model, and is wrong.
    dense = functools.partial(dense_mask, model.dtype)
    build = block_mask if config._attn_implementation == "flex_attention" else dense
    built = {kind: build(batch, window) for kind, window in layer_kinds(config).items()}
    return built if len(built) > 1 else next(iter(built.values()))


def layer_kinds(config: Any) -> dict[str, int | None]:
    """Return the sliding window in tokens of each kind of layer; None for layers that attend to all earlier tokens.

    Raises:
        ValueError: the model has a kind of layer that needs another mask.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of kind {', '.join(sorted(kinds))}")
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def dense_mask(dtype: torch.dtype, batch: Batch, window: int | None) -> Tensor:
    """Return ``[B, 1, L, L]``: 0 if the query attends to the key, else the least value of ``dtype``.

    A padding token attends to the padding before it, so that no row of the softmax is empty.
    """
    length = batch.input_ids.shape[1]
    group, answer, position = batch.group, batch.answer, batch.position_ids
    attends = torch.ones(length, length, dtype=torch.bool, device=group.device).tril()
    attends = attends & (group[:, :, None] == group[:, None, :])
    attends &= (answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :])
    if window:
        attends &= position[:, :, None] - position[:, None, :] < window
    mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
    return mask.masked_fill_(~attends, torch.finfo(dtype).min)[:, None]


def block_mask(batch: Batch, window: int | None) -> Any:
    """Return the same mask for flex_attention (torch.nn.attention.flex_attention), which skips blocks without a pair.

    torch's ``create_block_mask`` tests all pairs of tokens: 3 GiB and 14 s on a CPU for a row of 17,280 tokens. This
    function compares the ends of blocks: 13 ms for the same mask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = batch.input_ids.shape[1]
    tokens = (batch.group, batch.answer, batch.position_ids)
    group, answer, position = (pad(x, (0, -length % BLOCK), value=PAD) for x in tokens)

    def attends(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (group[b, query] == group[b, key]) & (query >= key)
        own = (answer[b, key] == 0) | (answer[b, query] == answer[b, key])
        near = position[b, query] - position[b, key] < window if window else True
        return same & own & near

    some, whole = attended_blocks(group, answer, position, window)
    if length % BLOCK:
        whole[:, -1] = False  # the last block of queries is longer than the row
    return BlockMask.from_kv_blocks(
        *counts_and_indices(some & ~whole),
        *counts_and_indices(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=attends,
        seq_lengths=(length, length),
    )


def attended_blocks(group: Tensor, answer: Tensor, position: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return which blocks of keys a block of queries attends to, in part or whole, and which it attends to whole.

    The arguments describe tokens ``[B, L]``; both results are ``[B, L / BLOCK, L / BLOCK]`` bool, queries first. The
    first and last token of a block suffice, because groups ascend in a row and answers ascend in a group.
    """
    groups, answers, positions = (x.unflatten(1, (-1, BLOCK)) for x in (group, answer, position))
    # unsqueeze(2) makes a value of each block of queries, unsqueeze(1) a value of each block of keys.
    diagonal = torch.eye(groups.shape[1], dtype=torch.bool, device=group.device)
    earlier = torch.ones_like(diagonal).tril(-1)
    # Some pair attends: the keys end in the group that the queries begin with, and have its prompt or its first answer.
    some = earlier & (groups[..., 0].unsqueeze(2) == groups[..., -1].unsqueeze(1))
    has_prompt = answers.amin(2) <= 0
    some &= has_prompt.unsqueeze(1) | (answers[..., 0].unsqueeze(2) == answers[..., -1].unsqueeze(1))
    # All pairs attend: all tokens are of one group, and the keys are its prompt, or belong to the queries' one answer.
    one_group = earlier & (groups[..., -1].unsqueeze(2) == groups[..., 0].unsqueeze(1))
    only_prompt = answers[..., -1] <= 0
    first_answer = answers.masked_fill(answers <= 0, torch.iinfo(answers.dtype).max).amin(2)
    whole = one_group & (only_prompt.unsqueeze(1) | (answers[..., -1].unsqueeze(2) == first_answer.unsqueeze(1)))
    if window:
        least, most = positions.amin(2), positions.amax(2)
        some &= ~one_group | (least.unsqueeze(2) - most.unsqueeze(1) < window)
        whole &= most.unsqueeze(2) - least.unsqueeze(1) < window
    return some | diagonal, whole


def counts_and_indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks are ``chosen`` for each query block, and their indices before all others.

    ``BlockMask`` takes blocks in this form.
    """
    chosen = chosen[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()
