"""Mistakes put into csrc/cuda, one at a time. The interpreter reports each; results alone would not show them all."""

import shutil
from typing import NamedTuple

import pytest
import torch

from tests.helpers.tiers import first_of_each_kind
from tests.ptx import csrc_cases
from tests.ptx.csrc_cases import Outcome
from tests.ptx.csrc_module import ARCHITECTURES, Module, with_changes

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")


class Mutant(NamedTuple):
    source: str  # that is compiled
    file: str  # that is changed
    old: str
    new: str
    finding: str
    line: str  # the file that the finding names


SLOPES, LOGITS, RMSPROP = "softmax_slopes", "logits_log_ratio", "rmsprop"
OUTSIDE = "global memory out of bounds"
MUTANTS = {
    "no barrier in over_block": Mutant(
        LOGITS, "cuda/reduce.h", "  __syncthreads();\n", "", "race, read after write", "reduce.h"
    ),
    "over_block called twice": Mutant(
        LOGITS, "cuda/logits_log_ratio.cu", "over_block(scan(row, vocabulary, logit), kNothing);",
        "over_block(over_block(scan(row, vocabulary, logit), kNothing), kNothing);",
        "race, write after read", "reduce.h",
    ),
    "parts of warps that are not there": Mutant(
        LOGITS, "cuda/reduce.h", "lane < blockDim.x / 32 ? of_warp[lane]", "lane < 32 ? of_warp[lane]",
        "memory is read that nobody wrote", "reduce.h",
    ),
    "no barrier between reading and overwriting": Mutant(
        SLOPES, "cuda/softmax_slopes.cu", "    __syncthreads();\n", "", "race, write after read", "vector.h"
    ),
    "a barrier in a condition": Mutant(
        SLOPES, "cuda/softmax_slopes.cu", "    if (at < last) values = read<width>(from + at);\n    __syncthreads();",
        "    if (at < last) {\n      values = read<width>(from + at);\n      __syncthreads();\n    }",
        "a barrier is reached by a part of a warp", "softmax_slopes.cu",
    ),
    "a load without its mask": Mutant(
        SLOPES, "cuda/softmax_slopes.cu", "if (at < last) values =", "values =", OUTSIDE, "vector.h"
    ),
    "a store without its mask": Mutant(
        SLOPES, "cuda/softmax_slopes.cu", "if (at < last) write(", "write(", OUTSIDE, "vector.h"
    ),
    "a bias beyond its end": Mutant(
        SLOPES, "cuda/softmax_slopes.cu", "min(at + k, last - 1)", "at + k", OUTSIDE, "softmax.h"
    ),
    "a vector too many": Mutant(
        LOGITS, "cuda/softmax.h", "for (; first < s.vectors;", "for (; first <= s.vectors;", OUTSIDE, "softmax.h"
    ),
    "vectors that count the head twice": Mutant(
        LOGITS, "cuda/softmax.h", "vectors = (vocabulary - head) / width", "vectors = vocabulary / width + (head > 0)",
        OUTSIDE, "softmax.h",
    ),
    "vectors that begin where the row does": Mutant(
        LOGITS, "cuda/softmax.h", "min(beyond ? width - beyond : 0, vocabulary)", "0", "misaligned", "softmax.h"
    ),
    "the edges written by all blocks of a row": Mutant(
        LOGITS, "cuda/logits_log_ratio.cu", "part == 0 && ", "", "race between blocks", "logits_log_ratio.cu"
    ),
    "parts of a row that overlap": Mutant(
        LOGITS, "cuda/logits_log_ratio.cu", "part * kRounds * blockDim.x", "part * blockDim.x",
        "race between blocks", "logits_log_ratio.cu",
    ),
    "a vector after the last": Mutant(
        LOGITS, "cuda/logits_log_ratio.cu", "if (v >= s.vectors) break;", "if (v > s.vectors) break;",
        OUTSIDE, "logits_log_ratio.cu",
    ),
    "the stride of another tensor": Mutant(
        LOGITS, "cuda/logits_log_ratio.cu", "row * g.grad_stride", "row * g.stride * 2", OUTSIDE, "logits_log_ratio.cu"
    ),
    "an offset after the last": Mutant(
        LOGITS, "cuda/logits_log_ratio.cu", "s.cu_seqlens[sequence + 1]", "s.cu_seqlens[sequence + 2]",
        OUTSIDE, "logits_log_ratio.cu",
    ),
    "vectors wherever tensors lie": Mutant(
        RMSPROP, "cuda/rmsprop.cu", "starts % 16 ? first :", "false ? first :", "misaligned", "vector.h"
    ),
    "a share beyond its parameter": Mutant(
        RMSPROP, "cuda/rmsprop.cu", "p.n - first < kShare ? p.n : first + kShare", "first + kShare", OUTSIDE, "vector.h"
    ),
    "shares of a parameter that overlap": Mutant(
        RMSPROP, "cuda/rmsprop.cu", "(blockIdx.x - table.first[low]) * kShare",
        "(blockIdx.x - table.first[low]) * kShare / 2", "race between blocks", "vector.h",
    ),
}  # fmt: skip


def outcomes(module: Module, source: str) -> list[Outcome]:
    """A few launches of the kernels of a source."""
    first = ARCHITECTURES[0]
    if source == SLOPES:
        cases = ((1003, torch.bfloat16, False), (1003, torch.float32, False), (1001, torch.bfloat16, True))
        return [csrc_cases.softmax_slopes(module, first, V, dtype, None, biased, 0) for V, dtype, biased in cases]
    if source == RMSPROP:
        return [csrc_cases.rmsprop(module, first, True, True, False, True, offset) for offset in (0, 1)]
    return [
        csrc_cases.token_logps(module, first, 5001, torch.float32, torch.bfloat16, None, 1),
        csrc_cases.write_gradient(module, first, 5001, torch.float32, None, 1, "apart"),
        csrc_cases.sequence_sums(module, first, "token", torch.float32),
    ]


@pytest.mark.parametrize("name", first_of_each_kind(MUTANTS, lambda name: MUTANTS[name].finding))
def test_a_mistake_is_reported(name, tmp_path):
    mutant = MUTANTS[name]
    module = with_changes(mutant.source, mutant.file, mutant.old, mutant.new, tmp_path)
    findings = [finding for outcome in outcomes(module, mutant.source) for finding in outcome.findings]
    assert any(mutant.finding in finding and mutant.line in finding for finding in findings), findings


@pytest.mark.parametrize("source", [SLOPES, LOGITS, RMSPROP])
def test_the_same_launches_of_the_real_sources_are_not_reported(source, tmp_path):
    opening = "namespace irlfast {\nnamespace {\n"
    module = with_changes(source, f"cuda/{source}.cu", opening, f"{opening}\n", tmp_path)
    assert all(outcome.findings == [] for outcome in outcomes(module, source))
