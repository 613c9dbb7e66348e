"""The counts of a run are those that follow from the kernel by hand."""

import numpy as np
import pytest

from tests.ptx.counts import wavefronts
from tests.ptx.machine import Allocation, run
from tests.ptx.snippets import Array, kernel, launch

REGISTERS = ".reg .b64 %at; .reg .b32 %x, %y; .reg .pred %p;"


def test_bytes_are_counted_by_allocation_and_whether_they_were_read_before():
    source, result = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    report = launch(
        """
        mad.wide.u32 %at, %thread, 4, %p0;
        ld.global.b32 %x, [%at];
        ld.global.b32 %x, [%at];
        ld.global.b32 %y, [%p0];
        mad.wide.u32 %at, %thread, 4, %p1;
        setp.lt.u32 %p, %thread, 8;
        @%p st.global.b32 [%at], %x;
        """,
        [Array(source), Array(result)],
        registers=REGISTERS,
    )
    assert report.findings == []
    read, written = report.counts.memory["p0"], report.counts.memory["p1"]
    assert (read.loaded, read.distinct_loaded, read.reread, read.stored) == (3 * 128, 128, 2 * 128, 0)
    assert (written.stored, written.distinct_stored, written.loaded) == (32, 32, 0)


def test_allocations_of_one_name_are_counted_together():
    rows = np.zeros((2, 64), np.uint32)[:, :32]
    allocations = [Allocation("rows", row.ctypes.data, row.nbytes) for row in rows]
    body = "ld.param.b64 %at, [row0];\nld.global.b32 %x, [%at];\nld.param.b64 %at, [row1];\nld.global.b32 %x, [%at];"
    ptx = kernel(body, ".param .u64 row0, .param .u64 row1", REGISTERS)
    report = run(ptx, "snippet", (1, 1, 1), (32, 1, 1), [one.address for one in allocations], allocations)
    assert report.findings == []
    assert (report.counts.memory["rows"].loaded, report.counts.memory["rows"].distinct_loaded) == (2 * 128, 8)


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (4, 4), (8, 8), (32, 32), (64, 32)])
def test_a_warp_asks_for_each_sector_once_per_instruction(stride, sectors):
    source = np.zeros(1024, np.uint32)
    source = source[-source.ctypes.data % 32 // 4 :][:512]  # from the start of a sector
    body = f"mad.wide.u32 %at, %thread, {stride}, %p0;\nld.global.b32 %x, [%at];\nld.global.b32 %y, [%at];"
    report = launch(body, [Array(source)], registers=REGISTERS)
    assert report.counts.memory["p0"].sectors_loaded == 2 * sectors


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        (4, 4, (1, 0)),
        (4, 8, (2, 1)),
        (4, 128, (32, 31)),
        (4, 0, (1, 0)),
        (2, 2, (1, 0)),
        (8, 8, (2, 0)),
        (16, 16, (4, 0)),
        (16, 32, (8, 4)),
        (16, 128, (32, 28)),
    ],
)
def test_lanes_that_need_other_words_of_one_bank_take_turns(size, stride, expected):
    lanes = np.arange(32)
    assert wavefronts(lanes * stride, lanes, size) == expected
    both = np.arange(64)
    assert wavefronts(both % 32 * stride, both, size) == tuple(2 * number for number in expected)


def test_instructions_are_counted_by_lane_and_class():
    report = launch(
        """
        mov.u32 %x, 0;
        LOOP:
        add.u32 %x, %x, 1;
        setp.lt.u32 %p, %x, 3;
        @%p bra LOOP;
        setp.lt.u32 %p, %thread, 5;
        @%p mul.f32 %y, %x, %x;
        bar.sync 0;
        """,
        registers=REGISTERS,
        threads=64,
        grid=3,
    )
    lanes = 3 * 64
    assert report.findings == []
    assert report.counts.threads == lanes
    assert report.counts.instructions == {
        "integer": lanes * (3 * 2 + 1),
        "move": lanes * 3,  # two of them in every snippet
        "branch": lanes * (3 + 1),
        "fp32": 3 * 5,
        "barrier": lanes,
    }
    assert report.counts.barriers == 3


def test_shared_memory_is_counted_with_its_conflicts():
    body = """
        mov.u32 %x, buffer;
        mad.lo.u32 %x, %thread, 8, %x;
        st.shared.b32 [%x], 1;
        ld.shared.b32 %y, [%x];
    """
    counts = launch(body, registers=REGISTERS, shared=".shared .align 16 .b8 buffer[512];", threads=64, grid=2).counts
    assert (counts.shared_loaded, counts.shared_stored) == (2 * 256, 2 * 256)
    assert (counts.wavefronts, counts.bank_conflicts) == (2 * 2 * 2 * 2, 2 * 2 * 2)
