"""Log-probabilities of targets straight from hidden states: projection, log-sum-exp and gather in one launch.

No logit ever reaches memory. One launch computes the tiles of policy and reference, on hidden rows that it gathers
through ``rows``. A second, small launch combines the parts that the vocabulary was cut into.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.softmax import base_of, index_in, rebased, softcap

PROGRAMS = 1024  # several waves on any GPU: the last one, which is not full, costs little
# Blocks of tokens that run side by side. The weight is then read from memory once per GROUP blocks, and the hidden rows
# of GROUP blocks stay in the L2 cache. In any other order, one of the two is read for each block anew.
GROUP = 8
PARTS = 32  # parts of the vocabulary, so that the programs of one group of blocks fill a GPU


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
def grouped(program, blocks, programs, GROUP: tl.constexpr):
    """The block of tokens and the part of the vocabulary of a program: GROUP blocks go through all parts, then others.

    The blocks of a group are next to each other in the order of the programs.
    """
    parts = programs // blocks
    first = program // (GROUP * parts) * GROUP
    size = min(blocks - first, GROUP)
    within = program - first * parts
    return first + within % size, within // size


@triton.jit
def score_part(
    hidden, weight, bias, row, target, first, last, V, H, scale,
    CAP: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Max and sum of exponentials of each row over columns ``first`` to ``last``, and its target's logit or −inf."""
    peak = tl.full([row.shape[0]], float("-inf"), tl.float32)
    norm = tl.zeros([row.shape[0]], tl.float32)
    z_target = tl.full([row.shape[0]], float("-inf"), tl.float32)
    for start in range(first, last, N):
        column = start + tl.arange(0, N)
        z = tile_logits(hidden, weight, bias, row, column, V, H, scale, CAP, PRECISION, K)
        new = tl.maximum(peak, tl.max(z, axis=1))
        base = base_of(new)
        norm = rebased(norm, peak, base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        peak = new
        z_target = tl.maximum(z_target, tl.max(tl.where(column[None, :] == target[:, None], z, float("-inf")), axis=1))
    return peak, norm, z_target


# A compilation takes seconds. The numbers of tokens and hidden rows and the alignment of their statistics change with
# every batch, so they are not compiled in.
@triton.jit(
    do_not_specialize=["n", "R"],
    do_not_specialize_on_alignment=["rows", "targets", "peaks", "sums", "picked"],
)
def parts_kernel(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, targets, peaks, sums, picked,
    n, R, V, H, REF_H, scale, per_part,
    CAP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens and part of the vocabulary, model): the statistics of the part.

    ``peaks``, ``sums`` and ``picked`` are [models, parts, n]; a part without the target leaves −inf in ``picked``.
    """
    block, part = grouped(tl.program_id(0), tl.cdiv(n, M), tl.num_programs(0), GROUP)
    model = tl.program_id(1).to(tl.int64)
    at = block * M + tl.arange(0, M)
    row = index_in(tl.load(rows + at, mask=at < n, other=0), R)
    target = tl.where(row < 0, -1, index_in(tl.load(targets + at, mask=at < n, other=0), V))
    row = tl.maximum(row, 0).to(tl.int64)
    first, last = part * per_part, min(part * per_part + per_part, V)
    if model == 0:
        peak, norm, z_target = score_part(
            hidden, weight, bias, row, target, first, last, V, H, scale, CAP, PRECISION, N, K
        )
    else:
        peak, norm, z_target = score_part(
            ref_hidden, ref_weight, ref_bias, row, target, first, last, V, REF_H, scale, CAP, PRECISION, N, K
        )
    out = (model * (tl.num_programs(0) // tl.cdiv(n, M)) + part) * n + at
    tl.store(peaks + out, peak, mask=at < n)
    norm = tl.where(target < 0, float("nan"), norm)
    tl.store(sums + out, norm, mask=at < n)
    tl.store(picked + out, z_target, mask=at < n)


@triton.jit(
    do_not_specialize=["n", "parts"],
    do_not_specialize_on_alignment=["peaks", "sums", "picked", "logps"],
)
def fold_kernel(peaks, sums, picked, logps, n, parts, M: tl.constexpr):
    """Log-probabilities [models, n] from the statistics of the parts [models, parts, n]."""
    at = tl.program_id(0) * M + tl.arange(0, M)
    model = tl.program_id(1).to(tl.int64)
    inside = at < n
    peak = tl.full([M], float("-inf"), tl.float32)
    norm = tl.zeros([M], tl.float32)
    z_target = tl.full([M], float("-inf"), tl.float32)
    for part in range(parts):
        where = (model * parts + part) * n + at
        part_peak = tl.load(peaks + where, mask=inside, other=0.0)
        new = tl.maximum(peak, part_peak)
        base = base_of(new)
        mass = tl.load(sums + where, mask=inside, other=0.0)
        norm = rebased(norm, peak, base) + rebased(mass, part_peak, base)
        peak = new
        z_target = tl.maximum(z_target, tl.load(picked + where, mask=inside, other=0.0))
    tl.store(logps + model * n + at, z_target - peak - tl.log(norm), mask=inside)


# ---------------------------------------------------------------- sizes of tiles


class Tile(NamedTuple):
    """The block that a program works on: M tokens, N columns of the vocabulary, K of ``hidden``; loads in flight."""

    M: int
    N: int
    K: int
    num_stages: int


NARROW = Tile(128, 128, 64, 3)  # of 16 bits
BEFORE_HOPPER = Tile(128, 128, 32, 3)  # of 16 bits: before sm_90, operands take registers too
WIDE = Tile(64, 32, 32, 1)  # of 32 bits: products are unrolled; with loads in flight, registers would spill


def tile_of(dtype: torch.dtype, device: torch.device) -> Tile:
    if dtype == torch.float32:
        return WIDE
    return NARROW if capability(device) >= (9, 0) else BEFORE_HOPPER


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


# ---------------------------------------------------------------- launch


def token_logps(
    models: list[tuple[Tensor, Tensor, Tensor | None]],  # policy, or policy and reference: hidden, weight, bias
    rows: Tensor,  # [n] the hidden row of each token
    targets: Tensor,  # [n]
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Log-probabilities ``[models, n]`` of targets, in fp32.

    They are NaN where the target is outside the vocabulary, or the row outside ``hidden``, which is never read.

    Logits are ``softcap(scale · (hidden[rows] @ weightᵀ + bias))``.
    """
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = models[0], models[-1]
    n, vocabulary = len(targets), weight.shape[0]
    tile = tile_of(hidden.dtype, hidden.device)
    blocks, wide = triton.cdiv(n, tile.M), triton.cdiv(vocabulary, tile.N)
    parts = min(wide, max(PARTS, PROGRAMS // max(1, blocks * len(models))))
    per_part = triton.cdiv(wide, parts) * tile.N
    parts = triton.cdiv(vocabulary, per_part)
    peaks, sums, picked = torch.empty(3, len(models), parts, n, dtype=torch.float32, device=hidden.device)
    logps = torch.empty(len(models), n, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return logps
    parts_kernel[(blocks * parts, len(models))](
        *(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, targets, peaks, sums, picked),
        *(n, hidden.shape[0], vocabulary, hidden.shape[1], ref_hidden.shape[1], scale, per_part),
        CAP=softcap,
        PRECISION="ieee",  # fp32 products in fp32, not in tf32
        **tile._asdict(),
        GROUP=GROUP,
        num_warps=8,
    )
    fold_kernel[(triton.cdiv(n, 128), len(models))](peaks, sums, picked, logps, n, parts, M=128, num_warps=4)
    return logps
