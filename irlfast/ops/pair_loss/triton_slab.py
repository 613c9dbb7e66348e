"""The pair slab on a GPU: the vendor's products with fp32 results, and one Triton pass between them.

Where no gradient can be taken from a slab, one Triton launch computes log-probabilities from hidden states.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class HeavySlab(NamedTuple):
    """A slab of which only the heavy tiles are multiplied."""

    exponentials: Tensor  # [n, V]
    heavy: Any  # irlfast.kernels.heavy_tiles.HeavyTiles

    @property
    def dtype(self) -> torch.dtype:
        return self.exponentials.dtype


def times_weight(slope: Tensor | HeavySlab, weight: Tensor) -> Tensor:
    if isinstance(slope, HeavySlab):
        from irlfast.kernels import heavy_tiles

        return heavy_tiles.times_weight(slope.exponentials, weight.contiguous(), slope.heavy)
    product = torch.empty(slope.shape[0], weight.shape[1], dtype=torch.float32, device=slope.device)
    logits(slope, weight.T, product)
    return product


def add_times_hidden(total: Tensor, slope: Tensor | HeavySlab, hidden: Tensor, new: bool) -> None:
    hidden = hidden.to(slope.dtype)
    if isinstance(slope, HeavySlab):
        from irlfast.kernels import heavy_tiles

        heavy_tiles.add_times_hidden(total, slope.exponentials, hidden, slope.heavy, new)
    elif slope.dtype == total.dtype or slope.device.type == "cpu":  # the latter under Triton's interpreter
        total.addmm_(slope.T.to(total.dtype), hidden.to(total.dtype), beta=float(not new))
    elif new:
        torch.mm(slope.T, hidden, out_dtype=total.dtype, out=total)
    elif torch.__version__ < "2.10":  # compares as versions; addmm of these adds to no wider sum
        for part, rows in zip(total.split(TILE), slope.T.split(TILE), strict=True):
            part += torch.mm(rows, hidden, out_dtype=total.dtype)
    else:
        torch.addmm(total, slope.T, hidden, out_dtype=total.dtype, out=total)


def contiguous(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, weight, bias = inputs
    return hidden.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()


def fused_logps(both: Sequence[HeadInputs], scored: ScoredTokens, tokens: Tensor) -> Tensor:
    from irlfast.kernels.linear import token_logps

    scoring = scored.rows_of(tokens), scored.targets[tokens], scored.logit_scale, scored.logit_softcap
    return token_logps([contiguous(inputs) for inputs in both], *scoring)


def exponentials(
    hidden: Tensor, targets: Tensor, inputs: HeadInputs, scored: ScoredTokens, out: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    from irlfast.kernels.exponentials import exponentials as kernel

    _, weight, bias = contiguous(inputs)
    scaling = scored.logit_scale, scored.logit_softcap
    logps, v, sums = kernel(hidden, weight, bias, targets, out, *scaling, slopes)
    return logps, v, out, (sums, targets)


def without_light_tiles(chunk: slab.Chunk, upstream: Tensor, scored: ScoredTokens) -> HeavySlab:
    from irlfast.kernels.heavy_tiles import heavy_tiles

    sums, targets = chunk.tile_weights
    factor = chunk.v[:, 0] * upstream
    heavy = heavy_tiles(sums, chunk.logps, targets, factor, upstream, scored.logit_scale, scored.skip_mass)
    return HeavySlab(chunk.slab, heavy)


KERNELS = slab.SlabKernels(
    slab_mb=math.inf,
    logits=logits,
    softmax=softmax,
    times_weight=times_weight,
    add_times_hidden=add_times_hidden,
    fused_logps=fused_logps,
)
EPILOGUE = KERNELS._replace(
    exponentials=exponentials,
    without_light_tiles=without_light_tiles,
    slab_dtype=torch.bfloat16,
    otherwise=KERNELS,
)
# Whether the exponential is taken in the product's epilogue by default. An H200 is slower so (docs/performance.md).
EPILOGUE_BY_DEFAULT = False


def takes_epilogue(scored: ScoredTokens) -> bool:
    """Return whether EPILOGUE computes a call. Its exponentials need the range of bf16, which is that of fp32."""
    return scored.operands == torch.bfloat16 and (EPILOGUE_BY_DEFAULT or scored.skip_mass > 0)
