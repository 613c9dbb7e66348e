"""On a GPU: the pair slab by the vendor's products with fp32 results and one Triton pass between them; and, where no
gradient is at hand to be taken from a slab, log-probabilities from hidden states in one Triton launch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss import slab

TILE = 8192  # rows of the weight's gradient at once, where a product cannot be added to it


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.device.type == "cpu":  # Triton's interpreter
        torch.mm(hidden.to(out.dtype), weight.T.to(out.dtype), out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)


def softmax(
    z: Tensor, targets: Tensor, side: HeadInputs, scored: ScoredTokens, slopes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    from irlfast.kernels.slab import softmax as kernel

    logps, slope = kernel(z, targets, side.bias, side.weight.dtype, scored.logit_scale, scored.logit_softcap, slopes)
    return logps, torch.ones_like(logps), slope


def by_weight(slope: Tensor, weight: Tensor) -> Tensor:
    product = torch.empty(slope.shape[0], weight.shape[1], dtype=torch.float32, device=slope.device)
    logits(slope, weight.T, product)
    return product


def by_hidden(total: Tensor, slope: Tensor, hidden: Tensor, new: bool) -> None:
    hidden = hidden.to(slope.dtype)
    if slope.dtype == total.dtype or slope.device.type == "cpu":  # that is Triton's interpreter
        total.addmm_(slope.T.to(total.dtype), hidden.to(total.dtype), beta=float(not new))
    elif new:
        torch.mm(slope.T, hidden, out_dtype=total.dtype, out=total)
    elif torch.__version__ < "2.10":  # as versions; its addmm adds to no wider sum
        for part, rows in zip(total.split(TILE), slope.T.split(TILE), strict=True):
            part += torch.mm(rows, hidden, out_dtype=total.dtype)
    else:
        torch.addmm(total, slope.T, hidden, out_dtype=total.dtype, out=total)


def packed(side: HeadInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    return side.hidden.contiguous(), side.weight.contiguous(), side.bias


def fused(sides: Sequence[HeadInputs], scored: ScoredTokens, tokens: Tensor, statistics: Tensor | None) -> Tensor:
    """``statistics`` takes the policy's log-probabilities, log-sum-exps, and those of the tiles."""
    from irlfast.kernels.linear import token_logps

    scoring = scored.rows_of(tokens), scored.targets[tokens], scored.logit_scale, scored.logit_softcap
    kept = None if statistics is None else of_scored(statistics, tokens)
    logps, lse = token_logps([packed(side) for side in sides], *scoring, None if kept is None else kept[2:])
    if kept is not None:
        kept[0], kept[1] = logps[0], lse[0]
    return logps


def of_scored(statistics: Tensor, tokens: Tensor) -> Tensor:
    """Their ``[2 + tiles, n]`` at the start of ``[2 + tiles, N]``."""
    count = statistics.shape[0]
    return statistics.flatten()[: count * len(tokens)].view(count, len(tokens))


def tiles(policy: HeadInputs) -> int:
    """Number of tiles that the vocabulary has in ``fused``."""
    from irlfast.kernels.linear import columns

    return -(-policy.weight.shape[0] // columns(policy.weight.dtype))


def sparse(
    sums: slab.Gradients,
    policy: HeadInputs,
    scored: ScoredTokens,
    tokens: Tensor,
    upstream: Tensor,
    statistics: Tensor,
) -> None:
    from irlfast.kernels.linear_backward import add_gradients

    kept = of_scored(statistics, tokens)
    add_gradients(
        *sums,
        packed(policy),
        scored.rows_of(tokens),
        scored.targets[tokens],
        (kept[0], kept[1], kept[2:]),
        upstream.contiguous(),
        scored.logit_scale,
        scored.logit_softcap,
        scored.skip_mass,
    )


KERNELS = slab.SlabKernels(math.inf, logits, softmax, by_weight, by_hidden, fused, sparse)
