"""Log-probabilities of targets straight from hidden states: projection, log-sum-exp and gather in one launch.

No logit ever reaches memory. The policy's tiles and the reference's are programs of the same launch, on hidden rows
gathered through ``rows``; a second, small launch folds the parts that the vocabulary was cut into.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.softmax import base_of, rebased, softcap

PROGRAMS = 1024  # several waves on any GPU, so that the last one costs little


@triton.jit
def tile_logits(
    hidden, weight, bias, row, column, V, H, scale, CAP: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr
):
    """Final logits [rows, columns] of a tile; −inf beyond the vocabulary."""
    inside = column < V
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, H, K):
        k = start + tl.arange(0, K)
        x = tl.load(hidden + row[:, None] * H + k[None, :], mask=k[None, :] < H, other=0.0)
        w = tl.load(
            weight + column[None, :].to(tl.int64) * H + k[:, None], mask=inside[None, :] & (k[:, None] < H), other=0.0
        )
        total = tl.dot(x, w, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total *= scale
    return tl.where(inside[None, :], softcap(total, CAP), float("-inf"))


@triton.jit
def score_part(
    hidden, weight, bias, row, target, first, last, V, H, scale, tiles, at, n,
    CAP: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Over columns ``first`` to ``last``: max and sum of exponentials of each row, its target's logit or −inf.

    ``tiles`` [V / N, n], or None, takes the log-sum-exp of every tile of N columns.
    """
    peak = tl.full([row.shape[0]], float("-inf"), tl.float32)
    norm = tl.zeros([row.shape[0]], tl.float32)
    found = tl.full([row.shape[0]], float("-inf"), tl.float32)
    for start in range(first, last, N):
        column = start + tl.arange(0, N)
        z = tile_logits(hidden, weight, bias, row, column, V, H, scale, CAP, PRECISION, K)
        new = tl.maximum(peak, tl.max(z, axis=1))
        base = base_of(new)
        mass = tl.sum(tl.exp(z - base[:, None]), axis=1)
        norm = rebased(norm, peak, base) + mass
        peak = new
        if tiles is not None:
            tl.store(tiles + tl.cast(start // N, tl.int64) * n + at, base + tl.log(mass), mask=at < n)
        found = tl.maximum(found, tl.max(tl.where(column[None, :] == target[:, None], z, float("-inf")), axis=1))
    return peak, norm, found


@triton.jit
def parts_kernel(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, targets, peaks, sums, picked, tiles,
    n, V, H, REF_H, scale, per_part,
    CAP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, part of the vocabulary, side): the statistics of its part.

    ``peaks``, ``sums`` and ``picked`` are [sides, parts, n]; a part without the target leaves −inf in ``picked``.
    """
    block, part, side = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = block * M + tl.arange(0, M)
    row = tl.load(rows + at, mask=at < n, other=0).to(tl.int64)
    target = tl.load(targets + at, mask=at < n, other=0).to(tl.int32)
    first, last = part * per_part, min(part * per_part + per_part, V)
    if side == 0:
        peak, norm, found = score_part(
            hidden, weight, bias, row, target, first, last, V, H, scale, tiles, at, n, CAP, PRECISION, N, K
        )
    else:
        peak, norm, found = score_part(
            ref_hidden,
            ref_weight,
            ref_bias,
            row,
            target,
            first,
            last,
            V,
            REF_H,
            scale,
            None,
            at,
            n,
            CAP,
            PRECISION,
            N,
            K,
        )
    out = (side * tl.num_programs(1) + part) * n + at
    tl.store(peaks + out, peak, mask=at < n)
    tl.store(sums + out, norm, mask=at < n)
    tl.store(picked + out, found, mask=at < n)


@triton.jit(do_not_specialize=["parts"])  # which follow from the number of tokens
def fold_kernel(peaks, sums, picked, logps, lse, n, parts, M: tl.constexpr):
    """Log-probabilities and log-sum-exps [sides, n] from the parts' statistics [sides, parts, n]."""
    at = tl.program_id(0) * M + tl.arange(0, M)
    side = tl.program_id(1).to(tl.int64)
    inside = at < n
    peak = tl.full([M], float("-inf"), tl.float32)
    norm = tl.zeros([M], tl.float32)
    found = tl.full([M], float("-inf"), tl.float32)
    for part in range(parts):
        where = (side * parts + part) * n + at
        theirs = tl.load(peaks + where, mask=inside, other=0.0)
        new = tl.maximum(peak, theirs)
        base = base_of(new)
        mass = tl.load(sums + where, mask=inside, other=0.0)
        norm = rebased(norm, peak, base) + rebased(mass, theirs, base)
        peak = new
        found = tl.maximum(found, tl.load(picked + where, mask=inside, other=0.0))
    tl.store(logps + side * n + at, found - peak - tl.log(norm), mask=inside)
    tl.store(lse + side * n + at, peak + tl.log(norm), mask=inside)


# ---------------------------------------------------------------- sizes of tiles


class Tile(NamedTuple):
    """What a program works on at once: M tokens, N columns of the vocabulary, K of ``hidden``; and loads in flight."""

    M: int
    N: int
    K: int
    num_stages: int

    def bytes(self, itemsize: int) -> int:
        """Shared memory that the loads in flight take."""
        return self.num_stages * (self.M + self.N) * self.K * itemsize


NARROW = Tile(128, 128, 64, 3), Tile(128, 128, 32, 3), Tile(128, 128, 32, 5), Tile(64, 128, 64, 4)  # of 16 bits
WIDE = (Tile(64, 32, 32, 1),)  # of 32 bits: products are unrolled, and loads in flight would take the last registers


def columns(dtype: torch.dtype) -> int:
    """N of every tile for operands of this dtype."""
    return (WIDE if dtype == torch.float32 else NARROW)[0].N


def tile_of(dtype: torch.dtype, device: torch.device) -> Tile:
    if dtype == torch.float32:
        return WIDE[0]
    return NARROW[0] if capability(device) >= (9, 0) else NARROW[1]  # before sm_90 operands take registers too


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def tuned(dtype: torch.dtype) -> Any:
    """``parts_kernel``, which times its tiles when it meets a new V and H, and keeps the outcome on disk."""

    def fitting(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
        hidden = arguments["hidden"]
        properties: Any = torch.cuda.get_device_properties(hidden.device)
        limit = properties.shared_memory_per_block_optin
        tiles = [Tile(config.kwargs["M"], columns(dtype), config.kwargs["K"], config.num_stages) for config in configs]
        return [config for config, tile in zip(configs, tiles, strict=True) if tile.bytes(dtype.itemsize) <= limit]

    tiles = WIDE if dtype == torch.float32 else NARROW
    configs = [triton.Config({"M": tile.M, "K": tile.K}, num_warps=8, num_stages=tile.num_stages) for tile in tiles]
    prune = {"early_config_prune": fitting}
    return triton.autotune(configs, key=["V", "H", "REF_H"], prune_configs_by=prune, cache_results=True)(parts_kernel)


# ---------------------------------------------------------------- launch


def token_logps(
    sides: list[tuple[Tensor, Tensor, Tensor | None]],  # policy, or policy and reference: hidden, weight, bias
    rows: Tensor,  # [n] the hidden row of each token
    targets: Tensor,  # [n]
    scale: float,
    softcap: float | None,
    tiles: Tensor | None = None,  # [V / columns, n] fp32: takes the log-sum-exps of the policy's tiles
) -> tuple[Tensor, Tensor]:
    """fp32 log-probabilities of targets and log-sum-exps, both ``[sides, n]``; logits are
    softcap(scale · (hidden[rows] @ weightᵀ + bias))."""
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = sides[0], sides[-1]
    n, vocabulary = len(targets), weight.shape[0]
    tile = tile_of(hidden.dtype, hidden.device)
    blocks, wide = triton.cdiv(n, tile.M), triton.cdiv(vocabulary, tile.N)
    parts = min(wide, max(1, PROGRAMS // max(1, blocks * len(sides))))
    per_part = triton.cdiv(wide, parts) * tile.N
    parts = triton.cdiv(vocabulary, per_part)
    peaks, sums, picked = torch.empty(3, len(sides), parts, n, dtype=torch.float32, device=hidden.device)
    logps, lse = torch.empty(2, len(sides), n, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return logps, lse
    if os.environ.get("IRLFAST_AUTOTUNE") == "1":
        kernel, options = tuned(hidden.dtype), {}
    else:
        kernel, options = parts_kernel, {"M": tile.M, "K": tile.K, "num_warps": 8, "num_stages": tile.num_stages}
    kernel[lambda sizes: (triton.cdiv(n, sizes["M"]), parts, len(sides))](
        *(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, targets, peaks, sums, picked, tiles),
        *(n, vocabulary, hidden.shape[1], ref_hidden.shape[1], scale, per_part),
        CAP=softcap,
        PRECISION="ieee",  # fp32 products in fp32, not in tf32
        N=tile.N,
        **options,
    )
    fold_kernel[(triton.cdiv(n, 128), len(sides))](peaks, sums, picked, logps, lse, n, parts, M=128, num_warps=4)
    return logps, lse
