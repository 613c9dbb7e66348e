"""Masks of packed batches, which let answers share a prompt and keep segments apart.

Additive and 4-D where the model runs SDPA or eager attention, a ``BlockMask`` for ``flex_attention``.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from irlfast.data.packing import PAD, Batch

BLOCK = 128  # tokens; flex_attention's default


def masks(model: Any, batch: Batch) -> Any:
    """The mask of every layer, or one for each kind of layer where a model has several."""
    config = model.config.get_text_config()
    # The mask has the model's own dtype: torch's SDPA on a CPU takes fp32 beside fp64, and is wrong.
    dense = functools.partial(dense_mask, model.dtype)
    build = block_mask if config._attn_implementation == "flex_attention" else dense
    built = {kind: build(batch, window) for kind, window in layer_kinds(config).items()}
    return built if len(built) > 1 else next(iter(built.values()))


def layer_kinds(config: Any) -> dict[str, int | None]:
    """The sliding window, in tokens, of each kind of layer; None where layers see everything before them.

    Raises:
        ValueError: a kind of layer that needs another mask.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of kind {', '.join(sorted(kinds))}")
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def dense_mask(dtype: torch.dtype, batch: Batch, window: int | None) -> Tensor:
    """``[B, 1, L, L]``: 0 where a token sees another, else ``dtype``'s least value. A pad sees the pads before it."""
    length = batch.input_ids.shape[1]
    group, answer, position = batch.group, batch.answer, batch.position_ids
    seen = torch.ones(length, length, dtype=torch.bool, device=group.device).tril()
    seen = seen & (group[:, :, None] == group[:, None, :])
    seen &= (answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :])
    if window:
        seen &= position[:, :, None] - position[:, None, :] < window
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def block_mask(batch: Batch, window: int | None) -> Any:
    """The same for ``flex_attention`` (torch.nn.attention.flex_attention), which skips blocks that nothing sees.

    torch's ``create_block_mask`` finds those by tensors of all pairs of tokens: 3 GiB for a row of 17,280, and 14 s on
    a CPU where this takes 13 ms for the same blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = batch.input_ids.shape[1]
    tokens = (batch.group, batch.answer, batch.position_ids)
    group, answer, position = (pad(x, (0, -length % BLOCK), value=PAD) for x in tokens)

    def seen(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (group[b, query] == group[b, key]) & (query >= key)
        own = (answer[b, key] == 0) | (answer[b, query] == answer[b, key])
        near = position[b, query] - position[b, key] < window if window else True
        return same & own & near

    some, whole = seen_blocks(group, answer, position, window)
    if length % BLOCK:
        whole[:, -1] = False  # its last tokens do not exist
    return BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length)
    )


def seen_blocks(group: Tensor, answer: Tensor, position: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Of tokens ``[B, L]``, which blocks of keys a block of queries may see, and which each of its tokens sees whole.

    ``[B, L / BLOCK, L / BLOCK]`` bool, queries before keys. A block's ends tell, as answers ascend in a segment.
    """
    groups, answers, positions = (x.unflatten(1, (-1, BLOCK)) for x in (group, answer, position))
    # Below, unsqueeze(2) makes of a block its queries, unsqueeze(1) its keys.
    diagonal = torch.eye(groups.shape[1], dtype=torch.bool, device=group.device)
    earlier = torch.ones_like(diagonal).tril(-1)
    with_prompt = answers.amin(2) <= 0
    some = earlier & (groups[..., 0].unsqueeze(2) == groups[..., -1].unsqueeze(1))
    some &= with_prompt.unsqueeze(1) | (answers[..., 0].unsqueeze(2) == answers[..., -1].unsqueeze(1))
    in_one = earlier & (groups[..., -1].unsqueeze(2) == groups[..., 0].unsqueeze(1))
    first_answer = answers.masked_fill(answers <= 0, torch.iinfo(answers.dtype).max).amin(2)
    only_prompt = answers[..., -1] <= 0
    whole = in_one & (only_prompt.unsqueeze(1) | (answers[..., -1].unsqueeze(2) == first_answer.unsqueeze(1)))
    if window:
        least, most = positions.amin(2), positions.amax(2)
        some &= ~in_one | (least.unsqueeze(2) - most.unsqueeze(1) < window)
        whole &= most.unsqueeze(2) - least.unsqueeze(1) < window
    return some | diagonal, whole


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees, and which, those first, as ``BlockMask`` takes them."""
    chosen = chosen[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()
