"""Shuffles and reductions of a warp, against the manual's formulas lane by lane."""

import functools
import operator

import numpy as np
import pytest

from tests.ptx.snippets import Array, launch

LANES = np.arange(32, dtype=np.uint32)


def manual_shuffle(mode: str, lane: int, by: int, clamp: int) -> tuple[int, bool]:
    """The source of a lane and whether it is in range, as the manual's pseudocode has them."""
    segment, limit, by = clamp >> 8 & 31, clamp & 31, by & 31
    highest, lowest = (lane & segment) | (limit & ~segment & 31), lane & segment
    if mode == "up":
        source = lane - by
        inside = source >= highest
    elif mode == "down":
        source = lane + by
        inside = source <= highest
    elif mode == "bfly":
        source = lane ^ by
        inside = source <= highest
    else:
        source = lowest | (by & ~segment & 31)
        inside = source <= highest
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_a_shuffle_reads_the_lane_of_the_manual(mode):
    for by in (0, 1, 3, 16, 31):
        for width in (32, 16, 4):
            clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
            values, result, inside = LANES * 7 + 1, np.zeros(32, np.uint32), np.zeros(32, np.uint32)
            report = launch(
                f"""
                mad.wide.u32 %at, %thread, 4, %p0;
                ld.global.b32 %x, [%at];
                shfl.sync.{mode}.b32 %y|%in, %x, {by}, {clamp}, -1;
                mad.wide.u32 %at, %thread, 4, %p1;
                st.global.b32 [%at], %y;
                selp.b32 %y, 1, 0, %in;
                mad.wide.u32 %at, %thread, 4, %p2;
                st.global.b32 [%at], %y;
                """,
                [Array(values), Array(result), Array(inside)],
                registers=".reg .b64 %at; .reg .b32 %x, %y; .reg .pred %in;",
            )
            assert report.findings == []
            expected = [manual_shuffle(mode, lane, by, clamp) for lane in range(32)]
            assert result.tolist() == [int(values[source]) for source, _ in expected], (mode, by, width)
            assert inside.astype(bool).tolist() == [ok for _, ok in expected], (mode, by, width)


@pytest.mark.parametrize(
    ("name", "combine"),
    [
        *(("add", operator.add), ("min", min), ("max", max)),
        *(("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)),
    ],
)
def test_a_reduction_is_that_of_all_lanes_of_a_warp(name, combine):
    for kind in ("b32",) if name in ("and", "or", "xor") else ("s32", "u32"):
        dtype = np.int32 if kind == "s32" else np.uint32
        values = np.random.default_rng(0).integers(0, 2**32, 64, np.uint64).astype(np.uint32).view(dtype)
        result = np.zeros(64, dtype)
        report = launch(
            f"""
            mad.wide.u32 %at, %thread, 4, %p0;
            ld.global.b32 %x, [%at];
            mov.b32 %members, -1;
            redux.sync.{name}.{kind} %x, %x, %members;
            mad.wide.u32 %at, %thread, 4, %p1;
            st.global.b32 [%at], %x;
            """,
            [Array(values), Array(result)],
            registers=".reg .b64 %at; .reg .b32 %x, %members;",
            threads=64,
        )
        assert report.findings == []
        for warp in (slice(0, 32), slice(32, 64)):
            expected = functools.reduce(combine, map(int, values[warp]))
            assert (result[warp] == np.array(expected & 0xFFFFFFFF, np.uint32).view(dtype)).all()


WHILE_HALF_IS_AWAY = """
    setp.lt.u32 %p, %thread, 16;
    @!%p bra AFTER;
    {code}
    AFTER:
    bar.warp.sync -1;
"""


@pytest.mark.parametrize(
    ("code", "mistake"),
    [
        ("shfl.sync.bfly.b32 %x, %thread, 1, 31, 0xffff;", None),
        ("shfl.sync.bfly.b32 %x, %thread, 1, 31, -1;", "lanes of a warp are missing: thread 16"),
        ("shfl.sync.bfly.b32 %x, %thread, 16, 31, 0xffff;", "a shuffle reads a lane that does not take part: thread 0"),
        ("bar.warp.sync 0xffff;", None),
        ("bar.warp.sync 0xff;", "lanes of a warp are missing: thread 8"),
    ],
)
def test_lanes_that_an_instruction_names_must_execute_it(code, mistake):
    report = launch(WHILE_HALF_IS_AWAY.format(code=code), registers=".reg .b32 %x; .reg .pred %p;")
    if mistake is None:
        assert report.findings == []
    else:
        [finding] = report.findings
        assert finding.startswith(f"snippet, snippet.cu:12: {mistake}")
