"""The Triton kernels of reward heads as custom operations of torch, so that compiled code calls each as a whole."""

from typing import Any

import torch
from torch import Tensor

from irlfast.ops.common.records import rebuild, schema_of
from irlfast.ops.rewards.losses import Options

# ---------------------------------------------------------------- logits


@torch.library.custom_op("irlfast::reward_head", mutates_args=())
def head_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, rows: Tensor | None, cu_seqlens: Tensor, token: bool
) -> tuple[Tensor, Tensor]:
    """Logits, and the hidden row of each sequence, −1 where it is empty; no rows for tokens."""
    from irlfast.kernels import rewards as kernels

    with torch.cuda.device_of(hidden):
        logits, _, _, item_rows, _ = kernels.forward(hidden, head, bias, rows, cu_seqlens, token)
    return logits, item_rows


@head_logits.register_fake
def _(
    hidden: Tensor, head: Tensor, bias: Tensor | None, rows: Tensor | None, cu_seqlens: Tensor, token: bool
) -> tuple[Tensor, Tensor]:
    logits = new_logits(hidden, head, rows, cu_seqlens, token)
    return logits, cu_seqlens.new_empty(0 if token else cu_seqlens.shape[0] - 1, dtype=torch.int64)


def new_logits(hidden: Tensor, head: Tensor, rows: Tensor | None, cu_seqlens: Tensor, token: bool) -> Tensor:
    outputs = (hidden if rows is None else rows).shape[0] if token else cu_seqlens.shape[0] - 1
    return hidden.new_empty(outputs, head.shape[0], dtype=torch.float32)


def save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, head, bias, rows, _, token = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.num_others, ctx.bias_dtype = len(inputs) - 3, None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, head, rows if token else output[1])


def differentiate_logits(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    hidden, head, rows = ctx.saved_tensors
    slopes = by_row(upstream, rows, hidden.shape[0])
    return *wanted_gradients(ctx, hidden, head, slopes, None), *[None] * ctx.num_others


head_logits.register_autograd(differentiate_logits, setup_context=save_rows)


# ---------------------------------------------------------------- losses


def has_formula(kind: str) -> bool:
    """Return whether the Triton kernel computes this loss."""
    from irlfast.kernels.rewards import KINDS

    return kind in KINDS


@torch.library.custom_op(
    "irlfast::discriminator_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor head, Tensor? bias, Tensor? rows, Tensor cu_seqlens, Tensor? labels, Tensor? pairs, "
    f"bool token, {schema_of(Options)}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def discriminate(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    labels: Tensor | None,
    pairs: Tensor | None,
    token: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, logits, rewards, and the slopes ``[R, M]`` of the loss by the logits of every hidden row."""
    from irlfast.kernels import rewards as kernels

    [record] = rebuild(options, Options)
    with torch.cuda.device_of(hidden):
        logits, reward, slopes, item_rows, losses = kernels.forward(
            hidden, head, bias, rows, cu_seqlens, token, labels, pairs, record
        )
    return losses.sum(), logits, reward, by_row(slopes, rows if token else item_rows, hidden.shape[0])


@discriminate.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    labels: Tensor | None,
    pairs: Tensor | None,
    token: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = new_logits(hidden, head, rows, cu_seqlens, token)
    return logits.new_empty(()), logits, torch.empty_like(logits), logits.new_empty(hidden.shape[0], head.shape[0])


def save_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, head, bias, *_ = inputs
    _, *others, slopes = output
    ctx.mark_non_differentiable(*others, slopes)
    ctx.num_others, ctx.bias_dtype = len(inputs) - 3, None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, head, slopes)


def differentiate_loss(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, head, slopes = ctx.saved_tensors
    return *wanted_gradients(ctx, hidden, head, slopes, upstream), *[None] * ctx.num_others


discriminate.register_autograd(differentiate_loss, setup_context=save_slopes)


# ---------------------------------------------------------------- gradients of both


def by_row(slopes: Tensor, rows: Tensor | None, height: int) -> Tensor:
    """Sums ``[R, M]`` over the items ``[I, M]`` that read each hidden row; a row of −1 is none.

    The heads are linear, so these sums are all that a row that is read twice needs. They are deterministic where torch
    is asked to be.
    """
    if rows is None:
        return slopes
    total = slopes.new_zeros(height, slopes.shape[1])
    return total if height == 0 else total.index_add(0, rows.clamp(min=0), torch.where(rows[:, None] >= 0, slopes, 0))


def wanted_gradients(
    ctx: Any, hidden: Tensor, head: Tensor, slopes: Tensor, upstream: Tensor | None
) -> list[Tensor | None]:
    """Gradients by hidden, head and bias, None for those that need none."""
    wanted = list(ctx.needs_input_grad[:3])
    computed = gradients(hidden, head, slopes, upstream, wanted)
    dtypes = hidden.dtype, head.dtype, ctx.bias_dtype
    return [
        gradient.to(dtype) if wants else None for gradient, dtype, wants in zip(computed, dtypes, wanted, strict=True)
    ]


@torch.library.custom_op("irlfast::reward_head_backward", mutates_args=())
def gradients(
    hidden: Tensor, head: Tensor, slopes: Tensor, upstream: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, head and bias (in fp32); an empty tensor for each that is not wanted."""
    from irlfast.kernels import rewards as kernels

    with torch.cuda.device_of(hidden):
        computed = kernels.backward(hidden, head, slopes, upstream, wanted)
    d_hidden, d_head, d_bias = (hidden.new_empty(0) if gradient is None else gradient for gradient in computed)
    return d_hidden, d_head, d_bias


@gradients.register_fake
def _(
    hidden: Tensor, head: Tensor, slopes: Tensor, upstream: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden, d_head, d_bias = (
        like.new_empty(shape) if wants else hidden.new_empty(0)
        for like, shape, wants in zip(
            (hidden, head, slopes), (hidden.shape, head.shape, head.shape[:1]), wanted, strict=True
        )
    )
    return d_hidden, d_head, d_bias
