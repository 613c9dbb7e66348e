"""The pair slab on a GPU: the vendor's products with fp32 results, and one Triton pass between them.

Where no gradient can be taken from a slab, one Triton launch computes log-probabilities from hidden states.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss import slab

TILE = 8192  # rows of the weight's gradient per product, where torch cannot add a product to a wider sum


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.device.type == "cpu":  # under Triton's interpreter
        torch.mm(hidden.to(out.dtype), weight.T.to(out.dtype), out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)


def softmax(
    z: Tensor, targets: Tensor, inputs: HeadInputs, scored: ScoredTokens, slopes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    from irlfast.kernels.slab import softmax as kernel

    dtype = inputs.weight.dtype
    logps, slope = kernel(z, targets, inputs.bias, dtype, scored.logit_scale, scored.logit_softcap, slopes)
    return logps, torch.ones_like(logps), slope


def times_weight(slope: Tensor, weight: Tensor) -> Tensor:
    product = torch.empty(slope.shape[0], weight.shape[1], dtype=torch.float32, device=slope.device)
    logits(slope, weight.T, product)
    return product


def add_times_hidden(total: Tensor, slope: Tensor, hidden: Tensor, new: bool) -> None:
    hidden = hidden.to(slope.dtype)
    if slope.dtype == total.dtype or slope.device.type == "cpu":  # the latter under Triton's interpreter
        total.addmm_(slope.T.to(total.dtype), hidden.to(total.dtype), beta=float(not new))
    elif new:
        torch.mm(slope.T, hidden, out_dtype=total.dtype, out=total)
    elif torch.__version__ < "2.10":  # compares as versions; addmm of these adds to no wider sum
        for part, rows in zip(total.split(TILE), slope.T.split(TILE), strict=True):
            part += torch.mm(rows, hidden, out_dtype=total.dtype)
    else:
        torch.addmm(total, slope.T, hidden, out_dtype=total.dtype, out=total)


def contiguous(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    return inputs.hidden.contiguous(), inputs.weight.contiguous(), inputs.bias


def fused_logps(both: Sequence[HeadInputs], scored: ScoredTokens, tokens: Tensor, statistics: Tensor | None) -> Tensor:
    """``statistics`` takes the policy's log-probabilities, its log-sum-exps, and those of each tile."""
    from irlfast.kernels.linear import token_logps

    scoring = scored.rows_of(tokens), scored.targets[tokens], scored.logit_scale, scored.logit_softcap
    kept = None if statistics is None else of_scored(statistics, tokens)
    logps, lse = token_logps([contiguous(inputs) for inputs in both], *scoring, None if kept is None else kept[2:])
    if kept is not None:
        kept[0], kept[1] = logps[0], lse[0]
    return logps


def of_scored(statistics: Tensor, tokens: Tensor) -> Tensor:
    """The ``[2 + tiles, n]`` of the n scored tokens, which lie at the start of the ``[2 + tiles, N]``."""
    count = statistics.shape[0]
    return statistics.flatten()[: count * len(tokens)].view(count, len(tokens))


def num_tiles(vocabulary: int, operands: torch.dtype) -> int:
    """The number of tiles that ``fused_logps`` cuts the vocabulary into."""
    from irlfast.kernels.linear import columns

    return -(-vocabulary // columns(operands))


def sparse_gradients(
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
        contiguous(policy),
        scored.rows_of(tokens),
        scored.targets[tokens],
        (kept[0], kept[1], kept[2:]),
        upstream.contiguous(),
        scored.logit_scale,
        scored.logit_softcap,
        scored.skip_mass,
    )


KERNELS = slab.SlabKernels(
    slab_mb=math.inf,
    logits=logits,
    softmax=softmax,
    times_weight=times_weight,
    add_times_hidden=add_times_hidden,
    fused_logps=fused_logps,
    sparse_gradients=sparse_gradients,
)
