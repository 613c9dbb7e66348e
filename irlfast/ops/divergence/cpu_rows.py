"""The divergence of rows of logits, and its derivatives, by PyTorch.

With q, r and m of :mod:`irlfast.ops.divergence.mixtures`, w = ``ref_share``, a = ``by_ref``, b = ``by_policy`` and
k = a (1 − w) − b w, the divergence and its derivatives by the policy's logits z are

    D = Σ −a r log(m/r) − b q log(m/q) + k (q − r)
    ∂D/∂z = g − q Σ g   with   g = −b q log(m/q) + (1 − w) k (q − r) q/m

The terms k (q − r) sum to 0. With them, every term of D is 0 and has slope 0 where q = r, so that rounded normalisers
hardly matter where the policy is near the reference. Equal logits give exactly 0, in D and in the derivatives.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from irlfast.ops.divergence.mixtures import Mixture
from irlfast.ops.pair_loss.cpu_slab import final_logits_

TILE = 2**16  # logits at a time: the results of the elementwise steps then stay in the cache


def divergence(
    z: Tensor,  # [n, V] the policy's products, overwritten
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    r: Tensor,  # [n, V] the reference's products, overwritten
    ref_bias: Tensor | None,  # [V]
    ref_scale: float,
    ref_softcap: float | None,
    mixture: Mixture,
    dtype: torch.dtype | None,  # of the derivatives: that of z; None where they are not wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences ``[n]``, and their derivatives by ``scale · (z + bias)``: units ``[n]`` times a slab ``[n, V]``."""
    final_logits_(z, bias, scale, softcap)
    final_logits_(r, ref_bias, ref_scale, ref_softcap)
    peak, log_norm = normaliser(z)
    ref_peak, ref_log_norm = normaliser(r)
    apart = (peak - ref_peak) + (log_norm - ref_log_norm)
    w, a, b = mixture
    k = a * (1 - w) - b * w
    value, total = z.new_zeros(2, len(z), 1)
    for z_tile, r_tile in tiles(z, r):
        log_ratio = (z_tile - r_tile).sub_(apart)  # z − r is exact where they are near
        above, ratio = log_ratio > 0, log_ratio.abs().neg_().exp_()
        larger = torch.where(above, z_tile - (peak + log_norm), r_tile - (ref_peak + ref_log_norm)).exp_()
        q, p = (torch.where(own, larger, larger * ratio) for own in (above, ~above))
        surplus = torch.where(above, larger, -larger) * (1 - ratio)  # q − p, of which few digits would be left
        log_m_q, log_m_r, q_over_m = mixed(log_ratio, above, ratio, w)
        by_policy = b * q * log_m_q
        value += (k * surplus - by_policy - a * p * log_m_r).sum(1, keepdim=True)
        if dtype is not None:
            g = (1 - w) * k * surplus * q_over_m - by_policy
            total += g.sum(1, keepdim=True)
            chain = 1 if softcap is None else 1 - (z_tile / softcap) ** 2
            z_tile.copy_(g * chain)
            r_tile.copy_(q * chain)
    if dtype is not None:
        z.addcmul_(r, total, value=-1)
    return value.squeeze(1), torch.ones_like(value).squeeze(1), z


def mixed(
    log_ratio: Tensor,  # log(q/r)
    above: Tensor,  # q > r
    ratio: Tensor,  # of the smaller to the larger of q and r
    ref_share: float,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """log(m/q), log(m/r) and q/m. No exponential overflows, and no logarithm is of 0."""
    if ref_share in (0, 1):
        return -ref_share * log_ratio, (1 - ref_share) * log_ratio, 1.0
    w = log_ratio.new_tensor(ref_share)  # in this dtype, w + (1 − w) is exactly 1
    s = torch.where(above, (1 - w) + w * ratio, w + (1 - w) * ratio)  # of m to the larger
    log_s = s.log()
    return log_s - log_ratio.clamp(max=0), log_s + log_ratio.clamp(min=0), torch.where(above, 1, ratio).div_(s)


def normaliser(z: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row, and the logarithm of the sum of the exponentials relative to it; both ``[n, 1]``."""
    peak = z.amax(1, keepdim=True)
    norm = torch.zeros_like(peak)
    for [tile] in tiles(z):
        norm += (tile - peak).exp_().sum(1, keepdim=True)
    return peak, norm.log()


def tiles(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same columns of each ``[n, V]``, some after the others."""
    columns = max(1, TILE // max(1, len(rows[0])))
    return zip(*(tensor.split(columns, dim=1) for tensor in rows), strict=True)
