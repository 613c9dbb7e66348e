"""Checks that a model computes what training assumes, by a forward pass of a few tokens (the probe)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from irlfast.common.files import InputError
from irlfast.common.messages import first_sentence
from irlfast.data.packing import SHARED, Batch, Layout, PromptGroup, pack
from irlfast.models.forward import attention_of, hidden_states
from irlfast.models.split import gathered
from irlfast.ops import Head

SEPARATE = Layout(shared=False)  # each answer in a row of its own: every model can run this layout
FORWARD_ERRORS = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def probe_batch(model: Any, layout: Layout) -> Batch:
    """Return a batch of two prompts with two answers each."""
    ids = torch.arange(12).remainder(model.config.get_text_config().vocab_size).tolist()
    groups = [PromptGroup(ids[:3], (ids[3:6], ids[5:8])), PromptGroup(ids[7:9], (ids[1:3], ids[8:12]))]
    return pack(groups, layout).to(model.device)


@torch.no_grad()
def probe_states(model: Any, layout: Layout) -> Tensor:
    """Return the hidden states ``[N, H]`` of the :func:`probe_batch` that predict answer tokens."""
    batch = probe_batch(model, layout)
    return hidden_states(model, batch)[batch.rows]


def check_forward(model: Any) -> Tensor:
    """Check that the model runs on token ids alone; return its :func:`probe_states` with every answer in its own row.

    Raises:
        InputError: the forward pass fails.
    """
    try:
        return probe_states(model, SEPARATE)
    except FORWARD_ERRORS as error:
        reason = f"{type(error).__name__} {first_sentence(error)}".rstrip()
        raise InputError(f"{type(model).__name__}: its forward pass of token ids alone fails ({reason})") from error


@torch.no_grad()
def check_logits(model: Any, head: Head, separate_states: Tensor) -> None:
    """Check that the head turns the last hidden states into the model's own logits.

    ``separate_states`` are those that :func:`check_forward` returned.

    Raises:
        InputError: the model's logits are others, so that training would optimise something else.
    """
    with gathered(head.weight, head.bias):
        logits = linear(separate_states, head.weight, head.bias).float() * head.logit_scale
    if head.logit_softcap:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    batch = probe_batch(model, SEPARATE)
    expected = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.rows].float()
    if not is_close(logits, expected, head.weight.dtype):
        raise InputError(f"{type(model).__name__}: its logits do not follow from its last hidden state and LM head")


def can_share_prompts(model: Any, separate_states: Tensor) -> bool:
    """Return whether answers that share a prompt have the hidden states of answers in rows of their own.

    ``separate_states`` are the latter, which :func:`check_forward` returned.
    """
    try:
        return is_close(probe_states(model, SHARED), separate_states, separate_states.dtype)
    except FORWARD_ERRORS:  # the model takes no such mask or no position ids
        return False


def check_layout(model: Any, layout: Layout, separate_states: Tensor) -> None:
    """Check that sequences packed in one row have the hidden states that they have in rows of their own.

    Raises:
        InputError: the attention lets the sequences of a row attend to each other.
    """
    if not is_close(probe_states(model, layout), separate_states, separate_states.dtype):
        raise InputError(
            f"{type(model).__name__}: {attention_of(model)} mixes the sequences of a row; try attn_implementation=sdpa"
        )


def is_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two tensors agree up to rounding in ``dtype``, relative to the largest value."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
