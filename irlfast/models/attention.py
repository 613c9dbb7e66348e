"""Hidden states of packed batches, and the choice of an attention for them."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irlfast.common.files import InputError
from irlfast.common.messages import log_once
from irlfast.config import Config
from irlfast.data.packing import SHARED, Batch, Layout, PromptGroup, pack, token_counts
from irlfast.models import varlen
from irlfast.models.load import first_sentence, head_of, head_size, is_reward
from irlfast.models.masks import masks
from irlfast.ops.common.heads import body_of, unwrapped

LEAST_GAIN = 0.05  # of the operations, for flex_attention in place of a faster kernel whose answers share no prompt
APART = Layout(shared=False)
FLEX_HEAD = 16  # the least size of a head that flex_attention's kernel takes
FAILED = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
SAMPLED = 1000  # segments that lengths are taken of


# ---------------------------------------------------------------- hidden states


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Last hidden states ``[B*L, H]``, after the final norm, of a packed batch."""
    return body_output(model, batch).last_hidden_state.flatten(0, 1)


def body_output(model: Any, batch: Batch, **options: Any) -> Any:
    """What the model under the head returns of a packed batch."""
    model = unwrapped(model)
    return body_of(model)(input_ids=batch.input_ids, use_cache=False, **who_sees_whom(model, batch), **options)


def who_sees_whom(model: Any, batch: Batch) -> dict[str, Any]:
    """What tells ``model`` the positions of a batch's tokens, and which tokens see which."""
    if by_sequences(model):
        return {
            "position_ids": batch.position_ids,
            "cu_seq_lens_q": batch.starts,
            "cu_seq_lens_k": batch.starts,
            "max_length_q": batch.longest,
            "max_length_k": batch.longest,
        }
    return {} if batch.causal else {"position_ids": batch.position_ids, "attention_mask": masks(model, batch)}


def attention_of(model: Any) -> str:
    return model.config.get_text_config()._attn_implementation


def by_sequences(model: Any) -> bool:
    """Whether its attention takes rows of several sequences by where each begins, and so lets none share a prompt."""
    return "flash" in attention_of(model) or attention_of(model) == varlen.NAME


# ---------------------------------------------------------------- what it costs


def operations(model: Any, found: Counter[str]) -> float:
    """Of forward and backward passes: products with the body's weights, the LM head's, and attention's.

    Two a weight and token forward, two for the gradient by the input, two by the weight where it is trained. The LM
    head meets answer tokens only. No recomputation is counted.
    """
    head, embeddings = head_of(model).weight, model.get_input_embeddings().weight
    both = {id(head), id(embeddings)}
    body = sum((6 if p.requires_grad else 4) * size_of(p) for p in model.parameters() if id(p) not in both)
    text = model.config.get_text_config()
    return (
        body * found["tokens"]
        + (6 if head.requires_grad else 4) * size_of(head) * found["answer_tokens"]
        + 12 * text.num_hidden_layers * text.hidden_size * found["attended"]
    )


def size_of(parameter: Tensor) -> int:
    if hasattr(parameter, "quant_state"):  # 4-bit weights, two or more in an element
        return math.prod(parameter.quant_state.shape)
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor


# ---------------------------------------------------------------- what a model can do


def arrange(model: Any, config: Config, groups: Sequence[PromptGroup]) -> Layout:
    """Check ``model``, choose its attention for ``groups``, and say how they are packed for it and why.

    Raises:
        InputError: as :func:`check_model` and :func:`check_layout`, or the model does not run on token ids alone.
    """
    model = unwrapped(model)
    try:
        head_of(model)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        apart = hidden_of(model, APART)
    except FAILED as error:
        name, found = type(model).__name__, f"{type(error).__name__} {first_sentence(error)}".rstrip()
        raise InputError(f"{name}: its forward pass of token ids alone fails ({found})") from error
    shared = check_model(model, apart)
    if not shared and not by_sequences(model):
        log_once(f"warning: {type(model).__name__} cannot share a prompt between answers; each gets its own")
    on_cpu = model.device.type == "cpu"
    auto = config.attn_implementation == "auto"
    if auto:
        gain, lengths = sharing(model, groups)
        if not on_cpu:
            model.set_attn_implementation(choose(shared and head_size(model) >= FLEX_HEAD, gain, varlen_of(model)))
    shared = shared and not by_sequences(model)
    if auto:
        saves = f"sharing prompts {'saves' if shared else 'would save'} {gain:.0%} of the operations"
        log_once(f"attention: {attention_of(model)}; {saves}: {lengths}")
    layout = Layout(shared, one_row=not on_cpu and (by_sequences(model) or attention_of(model) == "flex_attention"))
    if layout.one_row:
        check_layout(model, layout, apart)
    token, answer, seen = (operations(model, Counter({what: 1})) for what in ("tokens", "answer_tokens", "attended"))
    return layout._replace(keep_last_token=is_reward(model), answer_cost=answer / token, attended_cost=seen / token)


def check_layout(model: Any, layout: Layout, apart: Tensor) -> None:
    """Make sure that the :func:`probe`'s hidden states, packed like that, are those of its sequences apart.

    Raises:
        InputError: the attention lets sequences of a row see each other.
    """
    if not close(hidden_of(model, layout), apart, apart.dtype):
        name = attention_of(model)
        raise InputError(f"{type(model).__name__}: {name} mixes the sequences of a row; try attn_implementation=sdpa")


def choose(shared: bool, gain: float, unshared: str | None) -> str:
    """A GPU's attention. ``shared``: flex_attention can share prompts between answers, saving ``gain`` of the work.

    ``unshared``: a faster one, of rows without padding, but without shared prompts; None where there is none.
    """
    if shared and (gain >= LEAST_GAIN or not unshared):
        return "flex_attention"
    return unshared or "sdpa"


def varlen_of(model: Any) -> str | None:
    """The attention for rows of several sequences that a GPU can run here: an installed flash-attn, or else torch's."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if model.dtype in (torch.bfloat16, torch.float16):
        if is_flash_attn_3_available() and torch.cuda.get_device_capability(model.device)[0] == 9:
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return varlen.NAME if varlen.offer(model) else None


def sharing(model: Any, groups: Sequence[PromptGroup]) -> tuple[float, str]:
    """Which part of forward and backward passes' operations shared prompts save, and the mean lengths behind it."""
    some = groups[:: -(-len(groups) // SAMPLED)]
    together, apart = (operations(model, token_counts(some, Layout(shared=shared))) for shared in (True, False))
    lengths = [len(answer) for group in some for answer in group.answers]
    prompt, answer, answers = sum(len(x.prompt) for x in some) / len(some), sum(lengths) / len(lengths), len(lengths)
    each = f"{answers / len(some):.0f} answer{'s' * (answers > len(some))} of {answer:.0f}"
    return 1 - together / apart, f"on average prompts of {prompt:.0f} tokens with {each}"


def check_model(model: Any, apart: Tensor) -> bool:
    """Make sure that hidden states and head give this model's own logits; returns whether answers can share a prompt.

    ``apart``: the hidden states of the :func:`probe`'s sequences in rows of their own.

    Raises:
        InputError: where they do not; training on them would optimise something else.
    """
    if not is_reward(model):
        check_logits(model, apart)
    try:
        return close(hidden_of(model, SHARED), apart, apart.dtype)
    except FAILED:  # no such argument, or no such mask
        return False


def probe(model: Any, layout: Layout) -> Batch:
    """Two prompts with two answers each, to try a model with."""
    ids = torch.arange(12).remainder(model.config.get_text_config().vocab_size).tolist()
    groups = [PromptGroup(ids[:3], (ids[3:6], ids[5:8])), PromptGroup(ids[7:9], (ids[1:3], ids[8:12]))]
    return pack(groups, layout).to(model.device)


@torch.no_grad()
def hidden_of(model: Any, layout: Layout) -> Tensor:
    """The :func:`probe`'s hidden states ``[N, H]`` that predict answer tokens."""
    batch = probe(model, layout)
    return hidden_states(model, batch)[batch.rows]


@torch.no_grad()
def check_logits(model: Any, hidden: Tensor) -> None:
    head, batch = head_of(model), probe(model, APART)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
    if head.logit_softcap:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    own = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.rows].float()
    if not close(logits, own, head.weight.dtype):
        raise InputError(f"{type(model).__name__}: its logits do not follow from its last hidden state and LM head")


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
