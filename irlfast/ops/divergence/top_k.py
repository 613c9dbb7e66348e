"""The divergence over the top k tokens of a row: that of their logits, and of one more logit for the others.

The softmax over the gathered logits renormalises them. Where the others count as one token, its logit is their
log-sum-exp, and the derivative by this logit is shared among them by their probabilities.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from irlfast.ops.divergence.cpu_rows import normaliser, tiles
from irlfast.ops.divergence.mixtures import DivergenceSpec
from irlfast.ops.pair_loss.cpu_slab import final_logits_

Divergence = Callable[..., tuple[Tensor, Tensor, Tensor]]  # that of cpu_rows.py or of kernels/divergence.py


def divergence(
    rows: Divergence,
    z: Tensor,  # [n, V] the policy's products, overwritten
    bias: Tensor | None,  # [V]
    r: Tensor,  # [n, V] the reference's products, overwritten
    ref_bias: Tensor | None,  # [V]
    spec: DivergenceSpec,
    dtype: torch.dtype | None,  # of the derivatives, in the memory of z; None where they are not wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of ``rows`` over the top k tokens; the derivatives are by all logits."""
    final_logits_(z, bias, spec.logit_scale, spec.logit_softcap)
    final_logits_(r, ref_bias, spec.ref_logit_scale, spec.ref_logit_softcap)
    top = (r if spec.top_k_of == "reference" else z).topk(spec.top_k, dim=1).indices
    few, few_ref = z.gather(1, top), r.gather(1, top)
    at_top = derivative_of_softcap(few, spec.logit_softcap)
    if spec.tail:
        few, few_ref = with_tail(few, z, top), with_tail(few_ref, r, top)
    tail = few[:, spec.top_k :].clone()
    small = None if dtype is None else z.dtype
    values, units, slopes = rows(few, None, 1.0, None, few_ref, None, 1.0, None, spec.mixture(), small)
    if dtype is None:
        return values, units, z
    slab = z.view(dtype)[:, : z.shape[1]]
    slope_of_tail = slopes[:, spec.top_k :]
    # A narrower slab overwrites, tile by tile, logits that were read before.
    for z_tile, slab_tile in tiles(z, slab):
        if spec.tail:
            chain = derivative_of_softcap(z_tile, spec.logit_softcap)
            slab_tile.copy_((z_tile - tail).exp_() * (slope_of_tail * chain))
        else:
            slab_tile.zero_()
    slab.scatter_(1, top, (slopes[:, : spec.top_k] * at_top).to(dtype))
    return values, units, slab


def with_tail(few: Tensor, logits: Tensor, top: Tensor) -> Tensor:
    """The gathered logits ``[n, k]`` and that of all others, ``[n, k + 1]``. The gathered become −inf in ``logits``."""
    logits.scatter_(1, top, -math.inf)
    peak, log_norm = normaliser(logits)
    return torch.cat([few, peak + log_norm], 1)


def derivative_of_softcap(z: Tensor, softcap: float | None) -> Tensor | float:
    return 1.0 if softcap is None else 1 - (z / softcap) ** 2
