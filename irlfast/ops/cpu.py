"""The pair slab in plain PyTorch, for the CPU: fp32 products, as bf16 ones would round the logits."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from irlfast.ops import slab
from irlfast.ops.problem import Problem, Side

TILE = 2048  # rows of a bf16 weight widened at once


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    hidden = hidden.to(out.dtype)
    for part, rows in tiles(weight, out.dtype):
        torch.mm(hidden, rows.T, out=out[:, part])


def softmax(z: Tensor, targets: Tensor, side: Side, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    if side.bias is not None:
        z += side.bias.to(z.dtype)
    if problem.logit_scale != 1:
        z *= problem.logit_scale
    cap = problem.logit_softcap
    if cap is not None:
        z.div_(cap).tanh_().mul_(cap)
    picked, peak = z.gather(1, targets[:, None]), z.amax(1, keepdim=True)
    norm = exp_(z, peak, cap)
    at_target = -norm if cap is None else norm * ((picked / cap) ** 2 - 1)
    z.scatter_add_(1, targets[:, None], at_target)
    return (picked - peak - norm.log()).squeeze(1), -1 / norm.squeeze(1), z


def exp_(z: Tensor, peak: Tensor, cap: float | None) -> Tensor:
    """Replace logits z ``[n, V]`` by E = exp(z − peak) times the soft-cap's derivative; return ΣE ``[n, 1]``."""
    if cap is None:
        return z.sub_(peak).exp_().sum(1, keepdim=True)
    norm = torch.zeros_like(peak)
    for part in z.split(TILE, dim=1):
        exp = (part - peak).exp_()
        norm += exp.sum(1, keepdim=True)
        part.div_(cap).square_().neg_().add_(1).mul_(exp)
    return norm


def by_weight(slab: Tensor, weight: Tensor) -> Tensor:
    product = slab.new_zeros(slab.shape[0], weight.shape[1])
    for part, rows in tiles(weight, slab.dtype):
        product.addmm_(slab[:, part], rows)
    return product


def by_hidden(total: Tensor, slab: Tensor, hidden: Tensor) -> None:
    total.addmm_(slab.T, hidden)


def tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in ``dtype`` by rows: at once where it has that dtype, else never widened whole."""
    step = max(1, weight.shape[0]) if weight.dtype == dtype else TILE
    for start in range(0, weight.shape[0], step):
        part = slice(start, min(start + step, weight.shape[0]))
        yield part, weight[part].to(dtype)


SLAB_MB = 32  # elementwise steps stay in the last-level cache
ARITHMETIC = slab.Arithmetic(SLAB_MB, logits, softmax, by_weight, by_hidden)
token_logps = partial(slab.token_logps, ARITHMETIC)
pair_loss = partial(slab.pair_loss, ARITHMETIC)
