"""Mistakes put into the sources of the Triton kernels, each with the operation that shows it and how it is reported."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from tests.helpers import reward_cases
from tests.helpers.reward_cases import labels_of
from tests.kernels.test_rewards import check_head, check_loss
from tests.ptx import cases

BF16, FP32 = torch.bfloat16, torch.float32
VALUES, OUTSIDE, RACE = (
    "values differ from fp64",
    "out of bounds",
    "race",
)  # the first stands for itself, the others are in findings


class Mutant(NamedTuple):
    mistake: str
    file: str  # of kernels/
    text: str  # which occurs in it once
    replacement: str
    check: Callable[[], None]
    reports: tuple[str, ...]  # it must be reported by one of them
    architecture: int = 80


logits = partial(cases.check_logits, 37, FP32, {}, [2, 1])
sums = partial(cases.check_sums, [5, 0, 1030])
slab = partial(cases.check_slab, vocabulary=1001, dtype=BF16)
fused = partial(cases.check_fused, [70, 62], vocabulary=301, size=40, dtype=BF16)
epilogue = partial(cases.check_epilogue, [70, 62], vocabulary=301, size=40)
divergence = partial(cases.check_divergence, kind="jensen_shannon", vocabulary=1001, dtype=BF16)


def head(tokens: int = 8, size: int = 200) -> None:
    check_head(reward_cases.make([tokens], size=size, rows=False, dtype=FP32), "token")


def losses(kind: str, pooling: str, pairs: torch.Tensor | None = None) -> None:
    lengths = [5, 3, 2, 4]
    labels = labels_of(lengths) if pairs is None else None
    check_loss(reward_cases.make(lengths, dtype=FP32), labels=labels, pairs=pairs, kind=kind, pooling=pooling)


MUTANTS = [
    Mutant(
        "the mask of a load dropped",
        "logits.py",
        "tl.load(z + at, mask=inside, other=0.0)",
        "tl.load(z + at)",
        logits,
        (OUTSIDE,),
    ),
    Mutant(
        "the mask of a store dropped",
        "logits.py",
        "g * scale * slope, mask=at < V)",
        "g * scale * slope)",
        logits,
        (OUTSIDE, RACE),
    ),
    Mutant(
        "a mask that allows one element too many",
        "logits.py",
        "mask=token < last, other=0.0)",
        "mask=token <= last, other=0.0)",
        sums,
        (OUTSIDE, VALUES),
    ),
    Mutant(
        "the mask of a load dropped",
        "slab.py",
        "tl.load(z + at, mask=inside, other=0.0)",
        "tl.load(z + at)",
        slab,
        (OUTSIDE,),
    ),
    Mutant(
        "the mask of a store dropped",
        "slab.py",
        "derivative, mask=at < width)",
        "derivative)",
        partial(slab, dtype=FP32),
        (OUTSIDE, RACE),
    ),
    Mutant(
        "the mask of a store dropped",
        "divergence.py",
        "tl.store(slope + at, derivative, mask=inside)",
        "tl.store(slope + at, derivative)",
        partial(divergence, dtype=FP32),
        (OUTSIDE, RACE),
    ),
    Mutant(
        "the mask of a store dropped",
        "exponentials.py",
        "tl.store(where, exp * UNIT, mask=(at < kept)[:, None] & (column < V)[None, :])",
        "tl.store(where, exp * UNIT, mask=(at < kept)[:, None])",
        epilogue,
        (OUTSIDE, RACE),
    ),
    Mutant(
        "a slab read beyond its rows",
        "heavy_tiles.py",
        "mask=inside & (column < V)[None, :]",
        "mask=(column < V)[None, :]",
        epilogue,
        (OUTSIDE,),
    ),
    Mutant(
        "a bias read beyond the vocabulary",
        "slab.py",
        "mask=inside & (at < V)",
        "mask=inside",
        partial(slab, bias=True),
        (OUTSIDE,),
    ),
    Mutant(
        "a weight read beyond the vocabulary",
        "linear.py",
        "mask=inside[None, :] & (k[:, None] < H)",
        "mask=k[:, None] < H",
        fused,
        (OUTSIDE,),
    ),
    Mutant(
        "hidden states read beyond their end",
        "linear.py",
        "mask=k[None, :] < H",
        "mask=k[None, :] < H + 64",
        fused,
        (OUTSIDE,),
    ),
    Mutant(
        "the mask of a store dropped",
        "linear.py",
        "tl.store(picked + out, z_target, mask=at < n)",
        "tl.store(picked + out, z_target)",
        fused,
        (OUTSIDE, RACE),
    ),
    Mutant(
        "heads read beyond the last",
        "rewards.py",
        "mask=(head_index < M)[None, :] & (k < H)[:, None]",
        "mask=(k < H)[:, None]",
        head,
        (OUTSIDE,),
    ),
    Mutant(
        "the mask of a store dropped",
        "rewards.py",
        "tl.store(out, head_sum, mask=of_head)",
        "tl.store(out, head_sum)",
        head,
        (OUTSIDE, RACE),
    ),
    Mutant(
        "programs that write the same values",
        "rewards.py",
        "d_bias is not None and tl.program_id(0) == 0",
        "d_bias is not None",
        head,
        (RACE,),
    ),
    Mutant(
        "programs that write the same values",
        "linear.py",
        "model = tl.program_id(1).to(tl.int64)\n    inside",
        "model = tl.program_id(1).to(tl.int64) * 0\n    inside",
        fused,
        (RACE,),
    ),
    Mutant(
        "one program too many",
        "logits.py",
        "(n * triton.cdiv(vocabulary, block),)",
        "(n * triton.cdiv(vocabulary, block) + 1,)",
        logits,
        (OUTSIDE,),
    ),
    Mutant(
        "tiles of the vocabulary that all programs share",
        "exponentials.py",
        "part = tile * (N // COLUMNS) + tl.arange",
        "part = tl.arange",
        epilogue,
        (RACE,),
    ),
    Mutant(
        "a list of heavy tiles that begins anew",
        "heavy_tiles.py",
        "of_block + block * tiles + count + tl.cumsum",
        "of_block + block * 0 + count + tl.cumsum",
        epilogue,
        (RACE,),
    ),
    Mutant(
        "rows taken for adjacent",
        "logits.py",
        "score_row(logits + row * stride,",
        "score_row(logits + row * V,",
        partial(logits, gap=3),
        (VALUES,),
    ),
    Mutant(
        "rows of the gradient taken for adjacent",
        "logits.py",
        "grad + row * grad_stride + at, g * scale",
        "grad + row * (V + 3) + at, g * scale",
        logits,
        (OUTSIDE, VALUES),
    ),
    Mutant(
        "a stride in elements of another dtype",
        "slab.py",
        "slope += row * stride_slope",
        "slope += row * stride_z",
        slab,
        (RACE, VALUES),
    ),
    Mutant(
        "the width of the policy for the reference",
        "linear.py",
        "ref_hidden, ref_weight, ref_bias, row, target, first, last, V, REF_H, scale",
        "ref_hidden, ref_weight, ref_bias, row, target, first, last, V, H, scale",
        fused,
        (OUTSIDE, VALUES),
    ),
    Mutant(
        "the number of an item for that of its sequence",
        "rewards.py",
        "tl.where(item < paired, of_pair, item - paired)",
        "tl.where(item < paired, of_pair, item)",
        partial(losses, "bradley_terry", "last", torch.tensor([[0, 3], [2, 1]])),
        (OUTSIDE, VALUES),
    ),
    Mutant(
        "a loop that ends one logit early",
        "logits.py",
        "for start in range(0, V, ROUNDS * LANES)",
        "for start in range(0, V - 1, ROUNDS * LANES)",
        partial(cases.check_logits, 2049, FP32, {}, [2, 1]),
        (VALUES,),
    ),
    Mutant(
        "a loop that ends one logit early",
        "slab.py",
        "for start in range(0, V, ROUNDS * LANES):\n        at = start + offsets",
        "for start in range(0, V - 1, ROUNDS * LANES):\n        at = start + offsets",
        partial(slab, vocabulary=16385, bias=True),
        (VALUES,),
    ),
    Mutant(
        "a loop that ends one tile early",
        "heavy_tiles.py",
        "for i in range(tl.load(count_of_block + block)):",
        "for i in range(tl.load(count_of_block + block) - 1):",
        epilogue,
        (VALUES,),
    ),
    Mutant(
        "a loop that ends one column early",
        "linear.py",
        "for start in range(0, H, K)",
        "for start in range(0, H - 1, K)",
        partial(fused, size=65),
        (VALUES,),
    ),
    Mutant(
        "parts of the vocabulary that share a tile",
        "linear.py",
        "min(part * per_part + per_part, V)",
        "min(part * per_part + per_part + N, V)",
        fused,
        (VALUES,),
    ),
    Mutant(
        "a loop that ends one row early",
        "rewards.py",
        "min(first + per_part, R), BLOCK)",
        "min(first + per_part, R - 1), BLOCK)",
        partial(head, 17),
        (VALUES,),
    ),
    Mutant(
        "a count without the last sequence",
        "rewards.py",
        "length_of(sequence, sequence < S, cu_seqlens)",
        "length_of(sequence, sequence < S - 1, cu_seqlens)",
        partial(losses, "airl", "token"),
        (VALUES,),
    ),
    Mutant(
        "a barrier taken out",
        "divergence.py",
        "            tl.debug_barrier()",
        "            pass",
        divergence,
        (RACE,),
    ),
    Mutant(
        "a barrier taken out",
        "slab.py",
        "            tl.debug_barrier()",
        "            pass",
        slab,
        (RACE,),
    ),
]


# ---------------------------------------------------------------- in PTX


class Cut(NamedTuple):
    """All instructions of a kind, taken out of the PTX."""

    instruction: str  # a pattern
    check: Callable[[], None]
    reports: tuple[str, ...]
    architecture: int


long_fused = partial(cases.check_fused, [70, 62], vocabulary=301, size=384, dtype=BF16)
CUTS = [
    Cut(r"bar\.sync", long_fused, (RACE,), 80),
    Cut(r"bar\.sync", long_fused, (RACE,), 90),
    Cut(r"bar\.sync", slab, (RACE,), 80),
    Cut(r"bar\.sync", logits, (RACE,), 80),
    Cut(r"bar\.sync", partial(epilogue, size=384), (RACE,), 90),
    Cut(r"cp\.async\.wait_group", long_fused, ("cp.async",), 80),
    Cut(r"fence\.proxy\.async", long_fused, ("fence",), 90),
    Cut(r"wgmma\.fence", long_fused, ("wgmma",), 90),
    Cut(r"wgmma\.wait_group", long_fused, ("wgmma",), 90),
]
