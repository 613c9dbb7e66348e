"""Gradients of the log-probabilities of ``linear.py``: only the tiles of the logits that weigh enough are recomputed.

A trained model puts nearly all its probability on few tiles of the vocabulary. The other tiles' part of the gradient is
smaller than the rounding of a bf16 gradient. The forward keeps the log-sum-exp of every tile, so a tile without weight
costs neither its product nor the two products of its gradients. If a share s of the tiles is kept, that makes 1 + 3s
passes in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.linear import Tile, columns, tile_logits


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=["rows", "targets", "logps", "lse", "tiles", "upstream"],
)
def gradient_kernel(
    hidden, weight, bias, rows, targets, logps, lse, tiles, upstream, limit, d_hidden, d_weight, d_bias, n, V, H,
    scale, CAP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, tile of the vocabulary). A gradient that is None is not computed."""
    block, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = block * M + tl.arange(0, M)
    inside = at < n
    target = tl.load(targets + at, mask=inside, other=-1).to(tl.int32)
    g = tl.load(upstream + at, mask=inside, other=0.0)
    logp = tl.load(logps + at, mask=inside, other=0.0)
    total = tl.load(lse + at, mask=inside, other=0.0)
    column = tile * N + tl.arange(0, N)

    # The sum of a row's absolute derivatives over the tile: the tile's probability p, or with the target in it
    # (p − p_y) + (1 − p_y).
    mass = tl.exp(tl.load(tiles + tile * n + at, mask=inside, other=float("-inf")) - total)
    mass = tl.where(target // N == tile, mass + 1 - 2 * tl.exp(logp), mass)
    light = tl.abs(g) * mass <= tl.load(limit)  # False for NaN, which must reach the gradient
    if tl.min(light.to(tl.int32), axis=0) == 0:
        row = tl.load(rows + at, mask=inside, other=0).to(tl.int64)
        z = tile_logits(hidden, weight, bias, row, column, V, H, scale, CAP, PRECISION, K)
        exp = tl.exp(z - total[:, None])
        slope = tl.where(column[None, :] == target[:, None], 1 - exp, -exp)
        if CAP is not None:
            slope = tl.where(column[None, :] < V, slope * (1 - (z / CAP) * (z / CAP)), 0.0)
        slope = tl.where(inside[:, None], slope * (g * scale)[:, None], 0.0)
        if d_bias is not None:
            tl.atomic_add(d_bias + column, tl.sum(slope, axis=0), mask=column < V, sem="relaxed")
        narrow = slope.to(weight.dtype.element_ty)
        if d_hidden is not None:
            for start in range(0, H, K):
                k = start + tl.arange(0, K)
                where = column[:, None] * H + k[None, :]
                w = tl.load(weight + where, mask=(column[:, None] < V) & (k[None, :] < H), other=0.0)
                share = tl.dot(narrow, w, input_precision=PRECISION)
                where = row[:, None] * H + k[None, :]
                tl.atomic_add(d_hidden + where, share, mask=inside[:, None] & (k[None, :] < H), sem="relaxed")
        if d_weight is not None:
            for start in range(0, H, K):
                k = start + tl.arange(0, K)
                where = row[:, None] * H + k[None, :]
                x = tl.load(hidden + where, mask=inside[:, None] & (k[None, :] < H), other=0.0)
                share = tl.dot(tl.trans(narrow), x, input_precision=PRECISION)
                where = column[:, None] * H + k[None, :]
                tl.atomic_add(d_weight + where, share, mask=(column[:, None] < V) & (k[None, :] < H), sem="relaxed")


def add_gradients(
    d_hidden: Tensor | None,  # [R, H] fp32, added to
    d_weight: Tensor | None,  # [V, H] fp32, added to
    d_bias: Tensor | None,  # [V] fp32, added to
    policy: tuple[Tensor, Tensor, Tensor | None],  # hidden, weight, bias
    rows: Tensor,  # [n]
    targets: Tensor,  # [n]
    statistics: tuple[Tensor, Tensor, Tensor],  # log-probabilities [n], log-sum-exps [n], of tiles [V / N, n]
    upstream: Tensor,  # [n] fp32
    scale: float,
    softcap: float | None,
    skip_mass: float,
) -> None:
    """Add ``Σ_n upstream[n] · ∂ logp[n]``, by atomic additions, so that the sums are not deterministic.

    A tile is skipped if ``|upstream| · Σ_v |∂ logp / ∂ logit_v|`` is at most ``skip_mass · max |upstream|`` for every
    token of a block.
    """
    hidden, weight, bias = policy
    n, vocabulary = len(targets), weight.shape[0]
    if n == 0:
        return
    wide = hidden.dtype == torch.float32
    tile = Tile(64, columns(hidden.dtype), 16 if wide else 32, 3)  # with fewer tokens per tile, more tiles are skipped
    limit = upstream.abs().amax().reshape(1) * skip_mass
    gradient_kernel[(triton.cdiv(n, tile.M), triton.cdiv(vocabulary, tile.N))](
        *(hidden, weight, bias, rows, targets, *statistics, upstream, limit, d_hidden, d_weight, d_bias),
        *(n, vocabulary, hidden.shape[1], scale),
        CAP=softcap,
        PRECISION="ieee",
        **tile._asdict(),
        num_warps=8,
    )
