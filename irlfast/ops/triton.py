"""On a GPU: the pair slab by the vendor's products with fp32 results and one Triton pass between them; and, where no
gradient is at hand to be taken from a slab, log-probabilities from hidden states in one Triton launch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from irlfast.ops import slab
from irlfast.ops.problem import Problem, Side


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.to(out.dtype), weight.T.to(out.dtype), out=out)  # Triton's interpreter


def softmax(z: Tensor, targets: Tensor, side: Side, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    from irlfast.kernels.slab import softmax as kernel

    logps, slope = kernel(z, targets, side.bias, side.weight.dtype, problem.logit_scale, problem.logit_softcap)
    return logps, torch.ones_like(logps), slope


def by_weight(slope: Tensor, weight: Tensor) -> Tensor:
    product = torch.empty(slope.shape[0], weight.shape[1], dtype=torch.float32, device=slope.device)
    logits(slope, weight.T, product)
    return product


def by_hidden(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    hidden = hidden.to(slope.dtype)
    if slope.dtype == total.dtype:
        total.addmm_(slope.T, hidden)
    elif slope.is_cuda:
        torch.addmm(total, slope.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(slope.T.to(total.dtype), hidden.to(total.dtype))  # Triton's interpreter


def fused(sides: Sequence[Side], problem: Problem, tokens: Tensor) -> Tensor:
    from irlfast.kernels.linear import token_logps

    packed = [(side.hidden.contiguous(), side.weight.contiguous(), side.bias) for side in sides]
    rows, targets = problem.rows_of(tokens), problem.targets[tokens]
    return token_logps(packed, rows, targets, problem.logit_scale, problem.logit_softcap)


ARITHMETIC = slab.Arithmetic(math.inf, logits, softmax, by_weight, by_hidden, fused)
