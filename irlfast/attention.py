"""Hidden states of packed batches: masks that let answers share a prompt, and the choice of an attention for them.

A mask is additive and 4-D where the model runs SDPA or eager attention, a ``BlockMask`` for ``flex_attention``, and
none where rows are single sequences: then causality is all that is needed.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irlfast import dist
from irlfast.config import Config
from irlfast.files import InputError
from irlfast.metrics import say
from irlfast.model import base_of, head_of, is_reward
from irlfast.pack import Batch, Layout, Segment, pack, parts, tokens

CPU_TOKENS = 1024  # of a micro-batch: more is no faster there, and takes memory


# ---------------------------------------------------------------- hidden states


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Last hidden states ``[B*L, H]``, after the final norm, of a packed batch."""
    model = base_of(model)
    positions = {} if batch.causal else {"position_ids": batch.position_ids, "attention_mask": masks(model, batch)}
    output = model.base_model(input_ids=batch.input_ids, use_cache=False, **positions)
    return output.last_hidden_state.flatten(0, 1)


def masks(model: Any, batch: Batch) -> Any:
    """The mask of every layer, or one for each kind of layer where a model has several."""
    config = model.config.get_text_config()
    if config._attn_implementation.startswith("flash"):
        return None  # it finds the sequences of a row by their positions
    # The mask has the model's own dtype: torch's SDPA on a CPU takes fp32 beside fp64, and is wrong.
    dense = functools.partial(dense_mask, model.dtype)
    build = block_mask if config._attn_implementation == "flex_attention" else dense
    kinds = layer_kinds(config)
    built = {kind: build(batch, window) for kind, window in kinds.items()}
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
    segment, answer, position = batch.segment, batch.answer, batch.position_ids
    seen = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    seen = seen & (segment[:, :, None] == segment[:, None, :])
    seen &= (answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :])
    if window:
        seen &= position[:, :, None] - position[:, None, :] < window
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def block_mask(batch: Batch, window: int | None) -> Any:
    """The same for ``flex_attention`` (torch.nn.attention.flex_attention), which skips blocks that nothing sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    segment, answer, position = batch.segment, batch.answer, batch.position_ids

    def seen(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (segment[b, query] == segment[b, key]) & (query >= key)
        own = (answer[b, key] == 0) | (answer[b, query] == answer[b, key])
        near = position[b, query] - position[b, key] < window if window else True
        return same & own & near

    rows, length = batch.input_ids.shape
    return create_block_mask(seen, rows, None, length, length, device=str(segment.device))


# ---------------------------------------------------------------- what a model can do


def arrange(model: Any, config: Config) -> Layout:
    """Check ``model``, choose its attention, and say how segments are packed for it; one line of each choice.

    Raises:
        InputError: as :func:`check_model`.
    """
    shared = check_model(model)
    if not shared:
        say_once(f"warning: {type(model).__name__} cannot share a prompt between answers; each gets its own")
    if model.device.type == "cpu":
        return Layout(shared, whole=is_reward(model))
    if config.attn_implementation == "auto":
        varlen = importlib.util.find_spec("flash_attn")
        ways = ["flex_attention: answers share their prompt"] if shared else []
        ways += ["flash_attention_2: rows without padding"] if varlen else []
        chosen, _, why = [*ways, "sdpa: padded rows"][0].partition(": ")
        model.set_attn_implementation(chosen)
        say_once(f"attention: {chosen}, for {why}")
    chosen = model.config.get_text_config()._attn_implementation
    return Layout(shared, one_row=chosen.startswith(("flex", "flash")), whole=is_reward(model))


@functools.cache
def say_once(message: str) -> None:
    say(message)


def token_limit(config: Config, segments: Sequence[Segment], layout: Layout, count: int, halvings: int = 0) -> int:
    """Tokens of a micro-batch: as configured, else what ``count`` of the longest segments are, on a CPU few.

    ``halvings`` of the latter leave at least a segment.

    Raises:
        InputError: where a segment is longer than configured, or nothing is left to halve.
    """
    longest = max(sum(map(tokens, parts(segment, layout))) for segment in segments)
    if config.max_tokens_per_batch == "auto":
        few = CPU_TOKENS * min(dist.world_size(), 2)  # several processes reduce gradients after each, from ZeRO-2 on
        most = max(longest, few) if dist.device().type == "cpu" else longest * count
        if halvings and most >> (halvings - 1) <= longest:
            raise InputError(
                f"out of memory with one prompt and its answers, {longest} tokens; expected a lower max_length"
            )
        return max(longest, most >> halvings)
    if longest > config.max_tokens_per_batch:
        raise InputError(
            f"max_tokens_per_batch: found {config.max_tokens_per_batch}, but the longest prompt has {longest} tokens "
            "with its answers; expected more, or a lower max_length"
        )
    return config.max_tokens_per_batch


def check_model(model: Any) -> bool:
    """Make sure that hidden states and head give this model's own logits; returns whether answers can share a prompt.

    Raises:
        InputError: where they do not; training on them would optimise something else.
    """
    ids = torch.arange(8).remainder(model.config.get_text_config().vocab_size).tolist()
    prompt, expert, synthetic = ids[:3], ids[3:6], ids[5:]
    segment = Segment(prompt, (expert, synthetic))
    try:
        head = head_of(model)
    except ValueError as error:
        raise InputError(str(error)) from error
    with torch.no_grad():
        separate = pack([segment], Layout(shared=False)).to(model.device)
        hidden = hidden_states(model, separate)[separate.rows]
        if not is_reward(model):
            check_logits(model, hidden, separate)
        together = pack([segment]).to(model.device)
        try:
            return close(hidden_states(model, together)[together.rows], hidden, head.weight.dtype)
        except (TypeError, ValueError, RuntimeError, IndexError):  # no such argument, or no such mask
            return False


def check_logits(model: Any, hidden: Tensor, batch: Batch) -> None:
    head = head_of(model)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
    if head.logit_softcap:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    own = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.rows].float()
    if not close(logits, own, head.weight.dtype):
        raise InputError(f"{type(model).__name__}: its logits do not follow from its last hidden state and LM head")


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
