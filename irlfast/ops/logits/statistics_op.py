"""``token_statistics`` as a custom operation of torch, so that compiled code calls it as a whole.

With a, h and l the upstream gradients of log-probability, entropy H and log-sum-exp of a row, its gradient is

    a · [at the target] + p · (l − a − h · (log p + H))
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast.ops.logits import cpu_statistics
from irlfast.ops.logits.custom_op import saved_once


def functions_of(backend: str) -> Any:
    """The module with a backend's ``token_statistics`` and ``write_gradient``."""
    if backend == "cpu":
        return cpu_statistics
    from irlfast.kernels import statistics

    return statistics


def factors(by_logp: Tensor, by_entropy: Tensor, by_lse: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``by_logp``, ``by_all`` and ``by_entropy`` of ``write_gradient``, from the upstream gradients."""
    # where, not a product alone: 0 · NaN would spread the NaN of a row whose entropy nobody uses
    return by_logp, by_lse - by_logp - torch.where(by_entropy == 0, 0, by_entropy * entropies), by_entropy


@torch.library.custom_op("irlfast::logits_statistics", mutates_args=())
def forward(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, inplace: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and log-sum-exps, each ``[N]``."""
    with torch.cuda.device_of(logits):
        logps, entropies, lses = functions_of(backend).token_statistics(logits, targets, scale, softcap)
    return logps, entropies, lses


@forward.register_fake
def _(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logps = logits.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logps, torch.empty_like(logps), torch.empty_like(logps)


@torch.library.custom_op("irlfast::logits_write_statistics_gradient", mutates_args=("grad",))
def write_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lses: Tensor,
    by_logp: Tensor,
    by_all: Tensor,
    by_entropy: Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> None:
    with torch.cuda.device_of(logits):
        write = functions_of(backend).write_gradient
        write(grad, logits, targets, lses, by_logp, by_all, by_entropy, scale, softcap)


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.scale, ctx.softcap, ctx.inplace, ctx.backend = inputs
    _, entropies, lses = output
    ctx.overwritten, ctx.num_others = False, len(inputs) - 1
    ctx.save_for_backward(logits, targets, entropies, lses)


@once_differentiable
def differentiate(ctx: Any, by_logp: Tensor, by_entropy: Tensor, by_lse: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, entropies, lses = saved_once(ctx)
    grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
    row_factors = factors(by_logp, by_entropy, by_lse, entropies)
    write_gradient(grad, logits, targets, lses, *row_factors, ctx.scale, ctx.softcap, ctx.backend)
    return grad, *[None] * ctx.num_others


forward.register_autograd(differentiate, setup_context=save_forward)
