"""The two gradient products of the pair slab over its heavy tiles alone.

A large trained model puts nearly all its probability on few tokens (arXiv 2411.09009). The gradient of tiles without
them is smaller than the rounding of a bf16 gradient. The sums that ``exponentials.py`` leaves behind say how much each
tile weighs, so both products go through lists of the tiles that weigh enough: if a share s of them is heavy, that makes
1 + 2s passes in all. Each result has one program, which adds in the order of its list: sums are deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.exponentials import COLUMNS, UNIT

BLOCK = 64  # tokens: with fewer per block, more tiles are light
HIDDEN = 128  # columns of hidden rows per program
SIZES = {"COLUMNS": COLUMNS.value, "BLOCK": BLOCK, "HIDDEN": HIDDEN, "num_stages": 3, "num_warps": 8}  # of the products


class HeavyTiles(NamedTuple):
    """The tiles [BLOCK tokens, COLUMNS of the vocabulary] that weigh enough: lists, and how long each of them is."""

    of_block: Tensor  # [blocks, tiles] int32
    count_of_block: Tensor  # [blocks] int32
    of_tile: Tensor  # [tiles, blocks] int32
    count_of_tile: Tensor  # [tiles] int32


@triton.jit(do_not_specialize=["n"])
def blocks_kernel(
    sums, logps, targets, factor, upstream, limit, scale, heavy, of_block, count_of_block, n, tiles,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program per block: whether each tile is ``heavy`` [blocks, tiles], and the list of those that are."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    f = tl.abs(tl.load(factor + at, mask=inside, other=0.0)) * UNIT
    target_tile = tl.load(targets + at, mask=inside, other=-1) // COLUMNS
    # The derivative by the target's logit is 1 − p_y, which the sums lack.
    g = tl.abs(tl.load(upstream + at, mask=inside, other=0.0) * scale)
    own = g * (1 - tl.exp(tl.load(logps + at, mask=inside, other=0.0)))
    most = tl.load(limit)
    count = 0
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        both = (tile < tiles)[:, None] & inside[None, :]
        mass = tl.load(sums + tile[:, None].to(tl.int64) * n + at[None, :], mask=both, other=0.0) * f[None, :]
        mass += tl.where(tile[:, None] == target_tile[None, :], own[None, :], 0.0)
        light = tl.min((mass <= most).to(tl.int32), axis=1)  # 0 for NaN, which must reach the gradient
        kept = tl.where(tile < tiles, 1 - light, 0)
        tl.store(heavy + block * tiles + tile, kept.to(tl.uint8), mask=tile < tiles)
        tl.store(of_block + block * tiles + count + tl.cumsum(kept) - kept, tile, mask=kept == 1)
        count += tl.sum(kept)
    tl.store(count_of_block + block, count)


@triton.jit(do_not_specialize=["blocks"])
def tiles_kernel(heavy, of_tile, count_of_tile, blocks, tiles, BLOCKS: tl.constexpr):
    """One program per tile: the list of the blocks in which it is heavy."""
    tile = tl.program_id(0)
    count = 0
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        kept = tl.load(heavy + block * tiles + tile, mask=block < blocks, other=0).to(tl.int32)
        tl.store(of_tile + tile * blocks + count + tl.cumsum(kept) - kept, block, mask=kept == 1)
        count += tl.sum(kept)
    tl.store(count_of_tile + tile, count)


@triton.jit(do_not_specialize=["n"])
def times_weight_kernel(
    slab, weight, of_block, count_of_block, product, n, V, H, tiles, stride,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Program (columns of hidden, block of tokens): slab @ weight over the heavy tiles of the block."""
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(0) * HIDDEN + tl.arange(0, HIDDEN)
    inside, narrow = (at < n)[:, None], (k < H)[None, :]
    row = at.to(tl.int64)[:, None]
    total = tl.zeros([BLOCK, HIDDEN], tl.float32)
    for i in range(tl.load(count_of_block + block)):
        column = tl.load(of_block + block * tiles + i) * COLUMNS + tl.arange(0, COLUMNS)
        e = tl.load(slab + row * stride + column[None, :], mask=inside & (column < V)[None, :], other=0.0)
        where = column[:, None].to(tl.int64) * H + k[None, :]
        w = tl.load(weight + where, mask=(column < V)[:, None] & narrow, other=0.0)
        total = tl.dot(e, w, total)
    tl.store(product + row * H + k[None, :], total, mask=inside & narrow)


@triton.jit(do_not_specialize=["n", "blocks"])
def add_times_hidden_kernel(
    total, slab, hidden, of_tile, count_of_tile, n, V, H, blocks, stride,
    NEW: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Program (columns of hidden, tile): total += slabᵀ @ hidden over the blocks in which the tile is heavy."""
    tile = tl.program_id(1)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(0) * HIDDEN + tl.arange(0, HIDDEN)
    inside, narrow = (column < V)[:, None], (k < H)[None, :]
    count = tl.load(count_of_tile + tile)
    share = tl.zeros([COLUMNS, HIDDEN], tl.float32)
    for i in range(count):
        at = tl.load(of_tile + tile * blocks + i) * BLOCK + tl.arange(0, BLOCK)
        row = at.to(tl.int64)
        e = tl.load(slab + row[None, :] * stride + column[:, None], mask=inside & (at < n)[None, :], other=0.0)
        x = tl.load(hidden + row[:, None] * H + k[None, :], mask=(at < n)[:, None] & narrow, other=0.0)
        share = tl.dot(e, x, share)
    where = total + column[:, None].to(tl.int64) * H + k[None, :]
    if NEW:
        tl.store(where, share, mask=inside & narrow)
    elif count > 0:
        tl.store(where, tl.load(where, mask=inside & narrow, other=0.0) + share, mask=inside & narrow)


def heavy_tiles(
    sums: Tensor,  # [tiles, n] of the exponentials
    logps: Tensor,  # [n]
    targets: Tensor,  # [n]
    factor: Tensor,  # [n] that the slab is multiplied by
    upstream: Tensor,  # [n] the loss's derivatives g by the log-probabilities
    scale: float,
    skip_mass: float,
) -> HeavyTiles:
    """A tile is light if |g| · Σ_v |∂ logp / ∂ logit_v| ≤ ``skip_mass`` · max |g| for every token of a block."""
    tiles, n = sums.shape
    blocks = triton.cdiv(n, BLOCK)
    heavy = torch.empty(blocks, tiles, dtype=torch.uint8, device=sums.device)
    of_block = torch.empty(blocks, tiles, dtype=torch.int32, device=sums.device)
    of_tile = torch.empty(tiles, blocks, dtype=torch.int32, device=sums.device)
    count_of_block = torch.empty(blocks, dtype=torch.int32, device=sums.device)
    count_of_tile = torch.empty(tiles, dtype=torch.int32, device=sums.device)
    limit = upstream.abs().amax() * (skip_mass * abs(scale))
    blocks_kernel[(blocks,)](
        *(sums, logps, targets, factor, upstream, limit, scale, heavy, of_block, count_of_block, n, tiles),
        COLUMNS=COLUMNS.value,
        BLOCK=BLOCK,
        TILES=32,
        num_warps=4,
    )
    tiles_kernel[(tiles,)](heavy, of_tile, count_of_tile, blocks, tiles, BLOCKS=128, num_warps=1)
    return HeavyTiles(of_block, count_of_block, of_tile, count_of_tile)


def times_weight(slab: Tensor, weight: Tensor, heavy: HeavyTiles) -> Tensor:
    """``slab [n, V] @ weight [V, H]`` over the heavy tiles, ``[n, H]`` fp32."""
    (n, vocabulary), size = slab.shape, weight.shape[1]
    product = torch.empty(n, size, dtype=torch.float32, device=slab.device)
    blocks, tiles = heavy.of_block.shape
    times_weight_kernel[(triton.cdiv(size, HIDDEN), blocks)](
        *(slab, weight, heavy.of_block, heavy.count_of_block, product, n, vocabulary, size, tiles, slab.stride(0)),
        **SIZES,
    )
    return product


def add_times_hidden(total: Tensor, slab: Tensor, hidden: Tensor, heavy: HeavyTiles, new: bool) -> None:
    """``total [V, H] += slab [n, V]ᵀ @ hidden [n, H]`` over the heavy tiles; written, not added, where ``new``."""
    (n, vocabulary), size = slab.shape, hidden.shape[1]
    tiles, blocks = heavy.of_tile.shape
    add_times_hidden_kernel[(triton.cdiv(size, HIDDEN), tiles)](
        *(total, slab, hidden, heavy.of_tile, heavy.count_of_tile, n, vocabulary, size, blocks, slab.stride(0)),
        NEW=new,
        **SIZES,
    )
