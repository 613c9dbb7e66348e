"""The kernels of csrc/cuda as nvcc compiles them, for sm_80 and sm_90: right to fp64, and without a finding.

Sizes reach every loop: rows shorter than a vector, than a warp, than a block, and long enough for several vectors per
thread; rows that begin anywhere.
"""

import shutil

import pytest
import torch

from tests.helpers.tiers import sweep
from tests.ptx import csrc_cases, machine
from tests.ptx.csrc_cases import Outcome
from tests.ptx.csrc_module import ARCHITECTURES, original

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 7, 37, 1000, 1003, 5001, 9001]


def check(outcome: Outcome) -> None:
    assert outcome.reports and outcome.findings == []
    for actual, expected, tolerance in outcome.pairs:
        error = (actual.double() - expected).abs().max().item()
        assert error <= tolerance * expected.abs().max().item() + 3e-7  # a slope of 0 is a difference of numbers near 1


@sweep(
    V=VOCABULARIES,
    dtype=FLOATS,
    reference=[None, *FLOATS, torch.float64],
    cap=[None, 5.0],
    offset=[0, 1, 5],
    architecture=ARCHITECTURES,
)
def test_log_probabilities_are_right(V, dtype, reference, cap, offset, architecture):
    check(csrc_cases.token_logps(original(), architecture, V, dtype, reference, cap, offset))


@sweep(
    V=VOCABULARIES,
    dtype=FLOATS,
    cap=[None, 5.0],
    offset=[0, 1, 5],
    written=["in place", "apart", "unaligned"],
    architecture=ARCHITECTURES,
)
def test_the_gradient_is_right_wherever_it_is_written(V, dtype, cap, offset, written, architecture):
    check(csrc_cases.write_gradient(original(), architecture, V, dtype, cap, offset, written))


@sweep(
    V=VOCABULARIES,
    dtype=FLOATS,
    cap=[None, 5.0],
    biased=[False, True],
    offset=[0, 1],
    slopes=[True, False],
    architecture=ARCHITECTURES,
)
def test_slopes_over_the_logits_are_right(V, dtype, cap, biased, offset, slopes, architecture):
    check(csrc_cases.softmax_slopes(original(), architecture, V, dtype, cap, biased, offset, slopes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reference", ["none", "token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_sequences_are_right(reference, dtype, architecture):
    check(csrc_cases.sequence_sums(original(), architecture, reference, dtype))


@sweep(
    centred=[False, True],
    momentum=[False, True],
    narrow=[False, True],
    copied=[False, True],
    offset=[0, 1, 2],
    architecture=ARCHITECTURES,
)
def test_a_step_of_rmsprop_is_right(centred, momentum, narrow, copied, offset, architecture):
    check(csrc_cases.rmsprop(original(), architecture, centred, momentum, narrow, copied, offset))


def test_blocks_that_run_together_do_what_they_do_alone(monkeypatch):
    """The results, the findings and the counts are the same."""
    architecture = ARCHITECTURES[0]

    def outcomes() -> list[Outcome]:
        return [
            csrc_cases.token_logps(original(), architecture, 1003, torch.bfloat16, torch.float32, 5.0, 1),
            csrc_cases.write_gradient(original(), architecture, 5001, torch.float32, None, 1, "in place"),
            csrc_cases.sequence_sums(original(), architecture, "token", torch.float32),
            csrc_cases.rmsprop(original(), architecture, True, True, True, True, 1),
        ]

    together = outcomes()
    monkeypatch.setattr(machine, "BATCH", 1)
    for alone, other in zip(outcomes(), together, strict=True):
        check(alone)
        assert [report.counts for report in alone.reports] == [report.counts for report in other.reports]
        for (mine, *_), (theirs, *_) in zip(alone.pairs, other.pairs, strict=True):
            assert torch.equal(mine, theirs)


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_each_logit_is_read_once_and_each_slope_written_once(dtype, architecture):
    """The kernels are bound by memory. The target's logit is read once more; slopes need a second reading."""
    V, item = 5001, dtype.itemsize
    outcome = csrc_cases.token_logps(original(), architecture, V, dtype, None, None, 0)
    read = [traffic for name, traffic in outcome.reports[0].counts.memory.items() if name.startswith("logits")]
    assert sum(one.loaded for one in read) == 3 * (V + 1) * item  # three of four rows are scored
    outcome = csrc_cases.write_gradient(original(), architecture, V, dtype, None, 0, "apart")
    memory = outcome.reports[0].counts.memory
    assert sum(one.loaded for name, one in memory.items() if name.startswith("logits")) == 2 * V * item
    assert sum(one.stored for name, one in memory.items() if name.startswith("grad")) == 4 * V * item
    outcome = csrc_cases.softmax_slopes(original(), architecture, V, dtype, None, False, 0)
    rows = [one for name, one in outcome.reports[0].counts.memory.items() if name.startswith("z")]
    assert sum(one.loaded for one in rows) == 3 * (2 * V + 1) * 4
    assert sum(one.stored for one in rows) == 3 * V * item


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_of_rmsprop_reads_and_writes_each_number_once(architecture):
    outcome = csrc_cases.rmsprop(original(), architecture, True, True, True, True, 0)
    memory, elements = outcome.reports[0].counts.memory, 9000 + 37 + 3 + 1
    total = {"param": (4, 4), "square": (4, 4), "average": (4, 4), "buffer": (4, 4), "grad": (2, 0), "copy": (0, 2)}
    for name, (loaded, stored) in total.items():
        parts = [one for key, one in memory.items() if key.startswith(name)]
        assert sum(one.loaded for one in parts) == loaded * elements, name
        assert sum(one.stored for one in parts) == stored * elements, name
