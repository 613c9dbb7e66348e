"""The pair slab with the exponential in the epilogue of the product: no logits in memory, and half the bytes.

Exponentials are relative to the *target's* logit, which a dot product gives beforehand, so that no tile of the product
waits for a row's maximum:

    E_v = exp(z_v − z_y) for v ≠ y,   S = Σ_v E_v,   log π(y) = −log(1 + S)

−E_v / (1 + S) is the derivative of log π(y) by z_v, and S / (1 + S) that by z_y: E_y = −S is the target's entry. The
slab has 2⁻⁶⁴ E, so that an exponential vanishes only where a logit is 43 below the target's. Where one is 88 above, S
is infinite and the log-probability is −inf: the caller then takes another path.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.linear import GROUP, NARROW, Tile, grouped, tile_logits, tile_of
from irlfast.kernels.softmax import LOG2_E, index_in, softcap

LARGE = Tile(128, 256, 64, 3)  # where registers suffice: from sm_90 on, without a soft-cap
UNIT = tl.constexpr(2.0**-64)
COLUMNS = tl.constexpr(128)  # of the vocabulary per sum of exponentials: those of a tile in ``heavy_tiles.py``


@triton.jit
def target_logits_kernel(hidden, weight, bias, targets, out, V, H, scale, CAP: tl.constexpr, K: tl.constexpr):
    """One program per row: the final logit of its target; NaN for a target outside the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    target = tl.where(inside, target, 0)
    total = tl.zeros([K], tl.float32)
    for start in range(0, H, K):
        k = start + tl.arange(0, K)
        x = tl.load(hidden + row * H + k, mask=k < H, other=0.0).to(tl.float32)
        total += x * tl.load(weight + target * H + k, mask=k < H, other=0.0).to(tl.float32)
    z = tl.sum(total, axis=0)
    if bias is not None:
        z += tl.load(bias + target).to(tl.float32)
    tl.store(out + row, tl.where(inside, softcap(z * scale, CAP), float("nan")))


@triton.jit(do_not_specialize=["n", "kept"])
def exponentials_kernel(
    hidden, weight, bias, targets, z_target, slab, sums, n, kept, V, H, stride, scale,
    CAP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens and tile of the vocabulary): exponentials of the first ``kept`` rows, and sums of all.

    ``slab`` [n, V] has rows ``stride`` apart, and ``sums`` is [V / COLUMNS, n]. ``kept`` is no constant: sums have the
    same bits with a slab and without.
    """
    block, tile = grouped(tl.program_id(0), tl.cdiv(n, M), tl.num_programs(0), GROUP)
    at = block * M + tl.arange(0, M)
    row = tl.where(at < n, at, 0).to(tl.int64)
    column = tile * N + tl.arange(0, N)
    z = tile_logits(hidden, weight, bias, row, column, V, H, scale, CAP, PRECISION, K)
    base, own = tl.load(z_target + row), index_in(tl.load(targets + row), V)
    exp = tl.where(column[None, :] == own[:, None], 0.0, tl.exp2((z - base[:, None]) * LOG2_E))
    total = tl.sum(exp.reshape([M, N // COLUMNS, COLUMNS]), axis=2)
    part = tile * (N // COLUMNS) + tl.arange(0, N // COLUMNS)
    inside = (at < n)[:, None] & (part < tl.cdiv(V, COLUMNS))[None, :]
    tl.store(sums + part[None, :].to(tl.int64) * n + at[:, None], total, mask=inside)
    if CAP is not None:
        exp = tl.where(column[None, :] < V, exp * (1 - (z / CAP) * (z / CAP)), 0.0)
    where = slab + row[:, None] * stride + column[None, :]
    tl.store(where, exp * UNIT, mask=(at < kept)[:, None] & (column < V)[None, :])


@triton.jit(do_not_specialize=["n", "kept", "tiles"])
def row_sums_kernel(
    sums, z_target, targets, slab, logps, v, n, kept, tiles, stride, CAP: tl.constexpr, M: tl.constexpr
):
    """From the sums [tiles, n]: log-probabilities [n], the slab's factor v [n], and the targets' entries of the slab.

    Only the first ``kept`` rows get an entry.
    """
    at = tl.program_id(0) * M + tl.arange(0, M)
    inside = at < n
    total = tl.zeros([M], tl.float32)
    for tile in range(tiles):
        total += tl.load(sums + tl.cast(tile, tl.int64) * n + at, mask=inside, other=0.0)
    # log(1 + S) also for a small S: log(u) · S / (u − 1) with u = 1 + S as rounded. An infinite S gives −inf.
    u = 1 + total
    exact = (u == 1) | (total > 1e9)
    logp = -tl.where(u == 1, total, tl.log(u) * tl.where(exact, 1.0, total / tl.where(exact, 1.0, u - 1)))
    tl.store(logps + at, logp, mask=inside)
    tl.store(v + at, -1 / (u * UNIT), mask=inside)
    target = tl.load(targets + at, mask=inside, other=0)
    entry = -total * UNIT
    z = tl.load(z_target + at, mask=inside, other=0.0)
    if CAP is not None:
        entry *= 1 - (z / CAP) * (z / CAP)
    written = (at < kept) & (z == z)  # the logit of a target outside the vocabulary is NaN
    tl.store(slab + at.to(tl.int64) * stride + target, entry, mask=written)


def exponentials(
    hidden: Tensor,  # [n, H] bf16
    weight: Tensor,  # [V, H] bf16
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [n] int64
    slab: Tensor,  # [n, V] bf16, overwritten where ``slopes``
    scale: float,
    softcap: float | None,
    slopes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities ``[n]``, v ``[n]``, and the sums ``[V / COLUMNS, n]`` of the exponentials in the slab.

    The derivatives of the log-probabilities by ``scale · (hidden @ weightᵀ + bias)`` are v · slab. Where a row's
    exponentials overflow, its log-probability is −inf.
    """
    n, vocabulary = slab.shape
    tiles = triton.cdiv(vocabulary, COLUMNS.value)
    # Three tensors, not parts of one, whose alignment would change with n: Triton would compile anew.
    z_target, logps, v = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(3))
    sums = torch.empty(tiles, n, dtype=torch.float32, device=hidden.device)
    tile = tile_of(hidden.dtype, hidden.device)
    if tile == NARROW and softcap is None:
        tile = LARGE
    kept = n if slopes else 0
    sizes = vocabulary, hidden.shape[1]
    target_logits_kernel[(n,)](hidden, weight, bias, targets, z_target, *sizes, scale, CAP=softcap, K=1024)
    exponentials_kernel[(triton.cdiv(n, tile.M) * triton.cdiv(vocabulary, tile.N),)](
        *(hidden, weight, bias, targets, z_target, slab, sums, n, kept, *sizes, slab.stride(0), scale),
        CAP=softcap,
        PRECISION="ieee",
        **tile._asdict(),
        COLUMNS=COLUMNS.value,
        GROUP=GROUP,
        num_warps=8,
    )
    row_sums_kernel[(triton.cdiv(n, 128),)](
        *(sums, z_target, targets, slab, logps, v, n, kept, tiles, slab.stride(0)), CAP=softcap, M=128, num_warps=4
    )
    return logps, v, sums
