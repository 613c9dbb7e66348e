"""``token_logps`` as custom operations of torch, so that compiled code calls each as a whole.

An output that is not wanted is an empty tensor.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast.ops.common.checks import ON_GPU
from irlfast.ops.logits import cpu_rows


def functions_of(backend: str) -> Any:
    """The module with a backend's ``token_logps`` and ``write_gradient``, and on a GPU ``sequence_sums``."""
    if backend == "cpu":
        return cpu_rows
    if backend == "cuda":
        from irlfast.ops.logits import cuda_rows

        return cuda_rows
    from irlfast.kernels import logits

    return logits


@torch.library.custom_op("irlfast::logits_forward", mutates_args=())
def forward(
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities ``[N]``; log-sum-exps ``[N]`` where the backend keeps them; the reference's ``[N]``, if any."""
    with torch.cuda.device_of(logits):
        logps, lse, ref_logps = functions_of(backend).token_logps(logits, targets, ref_logits, scale, softcap)
    return logps, lse, logps.new_empty(0) if ref_logps is None else ref_logps


@forward.register_fake
def _(logits: Tensor, targets: Tensor, ref_logits: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    logps = logits.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    lse = torch.empty_like(logps) if rest[-1] in ON_GPU or cpu_rows.is_native(logits) else logps.new_empty(0)
    return logps, lse, logps.new_empty(0) if ref_logits is None else torch.empty_like(logps)


@torch.library.custom_op("irlfast::logits_write_gradient", mutates_args=("grad",))
def write_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    upstream: Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> None:
    """Write ``upstream · ∂ log-probability / ∂ logits`` into ``grad``, which may be ``logits``."""
    with torch.cuda.device_of(logits):
        functions_of(backend).write_gradient(grad, logits, targets, lse, upstream, scale, softcap)


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _, ctx.scale, ctx.softcap, ctx.inplace, ctx.backend = inputs
    _, lse, ref_logps = output
    ctx.overwritten, ctx.num_others = False, len(inputs) - 1
    ctx.mark_non_differentiable(lse, ref_logps)
    ctx.save_for_backward(logits, targets, lse)


def saved_once(ctx: Any) -> Any:
    """The saved tensors; a second time only where the first backward did not write over the logits."""
    if ctx.overwritten:
        raise RuntimeError("inplace_backward=True: the first backward wrote over the logits, there is no second")
    saved = ctx.saved_tensors
    ctx.overwritten = ctx.inplace
    return saved


@once_differentiable
def differentiate(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, lse = saved_once(ctx)
    grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
    write_gradient(grad, logits, targets, lse, upstream, ctx.scale, ctx.softcap, ctx.backend)
    return grad, *[None] * ctx.num_others


forward.register_autograd(differentiate, setup_context=save_forward)


@torch.library.custom_op("irlfast::logits_sequence_sums", mutates_args=())
def sequence_sums(logps: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None, backend: str) -> Tensor:
    """Log-ratio, policy's and reference's log-probability ``[3, S]`` of every sequence, on a GPU."""
    with torch.cuda.device_of(logps):
        sums: Tensor = functions_of(backend).sequence_sums(logps, targets, cu_seqlens, ref_logps)
    return sums


@sequence_sums.register_fake
def _(logps: Tensor, targets: Tensor, cu_seqlens: Tensor, *_: Any) -> Tensor:
    return logps.new_empty(3, cu_seqlens.numel() - 1)


def save_lengths(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logps, _, cu_seqlens, *_ = inputs
    ctx.tokens, ctx.num_others = logps.numel(), len(inputs) - 1
    ctx.save_for_backward(cu_seqlens.diff())


def differentiate_sums(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """A token's gradient is the sum of the gradients by its sequence's log-ratio and log-probability."""
    [lengths] = ctx.saved_tensors
    by_log_ratio, by_policy, _ = upstream
    by_token = (by_log_ratio + by_policy).repeat_interleave(lengths, output_size=ctx.tokens)
    return by_token, *[None] * ctx.num_others


sequence_sums.register_autograd(differentiate_sums, setup_context=save_lengths)
