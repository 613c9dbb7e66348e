"""Atomic additions that return what was there before."""

import numpy as np
import pytest

from tests.ptx.snippets import Array, launch


@pytest.mark.parametrize("places", [1, 4, 1024])
def test_an_atomic_addition_returns_what_earlier_lanes_left(places):
    totals, before = np.full(1024, 5, np.uint32), np.zeros(1024, np.uint32)
    report = launch(
        f"""
        mad.lo.u32 %lane, %block, 32, %thread;
        and.b32 %place, %lane, {places - 1};
        mad.wide.u32 %at, %place, 4, %p0;
        atom.global.gpu.relaxed.add.u32 %old, [%at], 3;
        mad.wide.u32 %to, %lane, 4, %p1;
        st.global.b32 [%to], %old;
        """,
        [Array(totals), Array(before)],
        registers=".reg .b32 %lane, %place, %old; .reg .b64 %at, %to;",
        grid=32,
    )
    assert report.findings == []
    assert totals.tolist() == [5 + 3 * (1024 // places)] * places + [5] * (1024 - places)
    for place in range(places):
        assert sorted(before[place::places]) == list(range(5, 5 + 3 * (1024 // places), 3))
