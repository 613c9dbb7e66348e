"""Loads, stores, moves, parameters, copies and atomic additions: the bytes that arrive, and where."""

import numpy as np
import pytest

from tests.ptx.machine import Allocation, run
from tests.ptx.snippets import Array, kernel, launch

REGISTERS = ".reg .b64 %at, %w, %w1; .reg .b32 %x, %y, %z, %u; .reg .b16 %h, %l, %m, %n; .reg .pred %p;"


@pytest.mark.parametrize(("kind", "bits"), [("b8", 8), ("b16", 16), ("b32", 32), ("b64", 64)])
def test_numbers_of_each_size_are_loaded_and_stored_where_they_lie(kind, bits):
    register = {8: "%h", 16: "%h", 32: "%x", 64: "%w"}[bits]
    for space, target in (("global", "%p1"), ("shared", "%p1")):
        source = np.random.default_rng(bits).integers(0, 2**bits - 1, 33, np.uint64).astype(f"uint{bits}")[1:]
        result = np.zeros(32, f"uint{bits}")
        through = f"""
            mov.u32 %y, buffer;
            mad.lo.u32 %y, %thread, {bits // 8}, %y;
            st.shared.{kind} [%y], {register};
            ld.shared.{kind} {register}, [%y];
        """
        body = f"""
            mad.wide.u32 %at, %thread, {bits // 8}, %p0;
            ld.global.{kind} {register}, [%at];
            {through if space == "shared" else ""}
            mad.wide.u32 %at, %thread, {bits // 8}, {target};
            st.global.{kind} [%at], {register};
        """
        shared = ".shared .align 8 .b8 buffer[256];"
        report = launch(body, [Array(source), Array(result)], registers=REGISTERS, shared=shared)
        assert report.findings == []
        assert (result == source).all()


def test_narrow_numbers_are_extended_by_their_type():
    source, result = np.array([0x80, 0xFF7F], np.uint16), np.zeros((32, 3), np.uint32)
    report = launch(
        """
        ld.global.s8 %x, [%p0];
        ld.global.u8 %y, [%p0];
        ld.global.s16 %z, [%p0+2];
        mad.wide.u32 %at, %thread, 12, %p1;
        st.global.b32 [%at], %x;
        st.global.b32 [%at+4], %y;
        st.global.b32 [%at+8], %z;
        """,
        [Array(source), Array(result)],
        registers=REGISTERS,
    )
    assert report.findings == []
    assert (result == [0xFFFFFF80, 0x80, 0xFFFFFF7F]).all()


@pytest.mark.parametrize("width", [2, 4])
def test_vectors_fill_registers_in_the_order_of_memory(width):
    source = np.arange(32 * width, dtype=np.uint32) * 3
    result = np.zeros_like(source)
    names = ", ".join(["%x", "%y", "%z", "%u"][:width])
    report = launch(
        f"""
        mad.wide.u32 %at, %thread, {4 * width}, %p0;
        ld.global.v{width}.b32 {{{names}}}, [%at];
        add.s32 %x, %x, 1;
        mad.wide.u32 %at, %thread, {4 * width}, %p1;
        st.global.v{width}.b32 [%at], {{{names}}};
        """,
        [Array(source), Array(result)],
        registers=REGISTERS,
    )
    assert report.findings == []
    assert (result.reshape(32, width) - source.reshape(32, width) == [1, 0, 0, 0][:width]).all()


def test_registers_are_packed_with_the_first_in_the_lowest_bits():
    result = np.zeros((32, 4), np.uint32)
    report = launch(
        """
        mov.b32 {%h, %l}, 0x12345678;
        mov.b32 %x, {%l, %h};
        mov.b64 %w, {%x, %thread};
        mov.b64 {%y, %z}, %w;
        mov.b64 %w1, {%h, %l, %l, %h};
        mad.wide.u32 %at, %thread, 16, %p0;
        st.global.v2.b32 [%at], {%y, %z};
        st.global.b64 [%at+8], %w1;
        """,
        [Array(result)],
        registers=REGISTERS,
    )
    assert report.findings == []
    assert (result[:, 0] == 0x56781234).all() and (result[:, 1] == np.arange(32)).all()
    assert (result[:, 2] == 0x12345678).all() and (result[:, 3] == 0x56781234).all()


def test_lanes_whose_guard_is_false_keep_their_registers_and_write_nothing():
    source, result = np.arange(32, dtype=np.uint32), np.full(32, 99, np.uint32)
    report = launch(
        """
        mov.u32 %x, 7;
        setp.lt.u32 %p, %thread, 20;
        mad.wide.u32 %at, %thread, 4, %p0;
        @%p ld.global.b32 %x, [%at];
        setp.lt.u32 %p, %thread, 30;
        mad.wide.u32 %at, %thread, 4, %p1;
        @%p st.global.b32 [%at], %x;
        """,
        [Array(source), Array(result)],
        registers=REGISTERS,
    )
    assert report.findings == []
    assert result.tolist() == [*range(20), *[7] * 10, 99, 99]


def test_special_registers_count_threads_and_blocks_along_three_axes():
    names = [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"]
    grid, block = (3, 2, 2), (8, 4, 2)
    result = np.zeros((12 * 64, 12), np.uint32)
    lines = [
        *("mov.u32 %x, %tid.z;", "mov.u32 %y, %tid.y;", "mad.lo.u32 %x, %x, 4, %y;", "mov.u32 %y, %tid.x;"),
        *("mad.lo.u32 %x, %x, 8, %y;", "mov.u32 %z, %ctaid.z;", "mov.u32 %y, %ctaid.y;", "mad.lo.u32 %z, %z, 2, %y;"),
        *("mov.u32 %y, %ctaid.x;", "mad.lo.u32 %z, %z, 3, %y;", "mad.lo.u32 %x, %z, 64, %x;"),
        "ld.param.b64 %w, [out];",
        "mad.wide.u32 %at, %x, 48, %w;",
        *(
            line
            for i, name in enumerate(names)
            for line in (f"mov.u32 %y, {name};", f"st.global.b32 [%at+{4 * i}], %y;")
        ),
    ]
    ptx = kernel("\n".join(lines), ".param .u64 out", REGISTERS)
    allocation = Allocation("out", result.ctypes.data, result.nbytes)
    assert run(ptx, "snippet", grid, block, [result.ctypes.data], [allocation]).findings == []
    for number, row in enumerate(result):
        b, t = divmod(number, 64)
        place = [t % 8, t // 8 % 4, t // 32, b % 3, b // 3 % 2, b // 6]
        assert row.tolist() == [*place, *block, *grid]


def test_parameters_lie_at_their_alignment_and_may_be_indexed():
    result = np.zeros(4, np.float64)
    ptx = kernel(
        """
        ld.param.b64 %at, [out];
        cvta.to.global.u64 %at, %at;
        ld.param.f32 %x, [small];
        ld.param.v2.b32 {%y, %z}, [struct+8];
        mov.b64 %w, struct;
        ld.param.b32 %u, [%w+4];
        st.global.b32 [%at], %x;
        st.global.b32 [%at+4], %y;
        st.global.b32 [%at+8], %z;
        st.global.b32 [%at+12], %u;
        """,
        ".param .u64 .ptr .global .align 1 out, .param .f32 small, .param .align 8 .b8 struct[16]",
        REGISTERS,
    )
    struct = np.array([1, 2, 3, 4], np.uint32).tobytes()
    allocation = Allocation("out", result.ctypes.data, result.nbytes)
    report = run(ptx, "snippet", (1, 1, 1), (32, 1, 1), [result.ctypes.data, 0.5, struct], [allocation])
    assert report.findings == []
    assert result.view(np.float32)[0] == 0.5 and result.view(np.uint32)[1:4].tolist() == [3, 4, 2]


def test_a_negative_integer_is_an_argument_of_its_size():
    result = np.zeros(32, np.int64)
    ptx = kernel(
        "ld.param.b64 %at, [out];\nld.param.b32 %x, [n];\ncvt.s64.s32 %w, %x;\nst.global.b64 [%at], %w;",
        ".param .u64 out, .param .u32 n",
        REGISTERS,
    )
    allocation = Allocation("out", result.ctypes.data, result.nbytes)
    run(ptx, "snippet", (1, 1, 1), (32, 1, 1), [result.ctypes.data, -5], [allocation])
    assert result[0] == -5


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_copy_brings_its_bytes_or_zeros(size):
    words = size // 4
    source = np.arange(1, 32 * words + 1, dtype=np.uint32)
    result = np.zeros((32, words), np.uint32)
    moves = "\n".join(f"ld.shared.b32 %z, [%y+{4 * i}];\nst.global.b32 [%at+{4 * i}], %z;" for i in range(words))
    report = launch(
        f"""
        mov.u32 %y, buffer;
        mad.lo.u32 %y, %thread, {size}, %y;
        mad.wide.u32 %at, %thread, {size}, %p0;
        setp.lt.u32 %p, %thread, 10;
        selp.b32 %x, {size}, 0, %p;
        cp.async.{"cg" if size == 16 else "ca"}.shared.global [%y], [%at], {size}, %x;
        cp.async.commit_group;
        cp.async.wait_group 0;
        mad.wide.u32 %at, %thread, {size}, %p1;
        {moves}
        """,
        [Array(source), Array(result)],
        registers=REGISTERS,
        shared=".shared .align 16 .b8 buffer[512];",
    )
    assert report.findings == []
    assert (result[:10] == source.reshape(32, words)[:10]).all() and (result[10:] == 0).all()


def test_waiting_ends_all_groups_of_copies_but_the_last_ones():
    """Loops whose lanes leave at different times keep their own groups."""
    source, result = np.arange(64, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """
        mov.u32 %y, buffer;
        mad.lo.u32 %y, %thread, 4, %y;
        mad.wide.u32 %at, %thread, 4, %p0;
        cp.async.ca.shared.global [%y], [%at], 4;
        cp.async.commit_group;
        cp.async.ca.shared.global [%y+128], [%at+128], 4;
        cp.async.commit_group;
        cp.async.wait_group KEPT;
        ld.shared.b32 %z, [%y+128];
        cp.async.wait_group 0;
        mad.wide.u32 %at, %thread, 4, %p1;
        st.global.b32 [%at], %z;
    """
    arrays, shared = [Array(source), Array(result)], ".shared .align 16 .b8 buffer[256];"
    assert launch(body.replace("KEPT", "0"), arrays, registers=REGISTERS, shared=shared).findings == []
    assert (result == source[32:]).all()
    findings = launch(body.replace("KEPT", "1"), arrays, registers=REGISTERS, shared=shared).findings
    assert any("memory is touched while cp.async fills it" in finding for finding in findings)


@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f64", np.float64), ("u32", np.uint32)])
def test_atomic_additions_of_all_blocks_add_up(kind, dtype):
    totals, register = np.zeros(4, dtype), "%w" if kind == "f64" else "%x"
    convert = {
        "f32": "cvt.rn.f32.u32 %x, %thread;",
        "f64": "cvt.rn.f64.u32 %w, %thread;",
        "u32": "mov.u32 %x, %thread;",
    }
    report = launch(
        f"""
        and.b32 %y, %thread, 3;
        mad.wide.u32 %at, %y, {np.dtype(dtype).itemsize}, %p0;
        {convert[kind]}
        red.global.gpu.relaxed.add.{kind} [%at], {register};
        """,
        [Array(totals)],
        registers=REGISTERS,
        grid=400,
        threads=64,
    )
    assert report.findings == []
    assert totals.tolist() == [400 * sum(range(k, 64, 4)) for k in range(4)]
    assert report.counts.atomics == 400 * 64


def test_a_vector_of_atomic_additions_adds_to_neighbours():
    totals = np.zeros((2, 4), np.float32)
    report = launch(
        """
        and.b32 %y, %thread, 1;
        mad.wide.u32 %at, %y, 16, %p0;
        mov.b32 %x, 0f3F800000;
        mov.b32 %z, 0f40000000;
        red.global.gpu.relaxed.add.v4.f32 [%at], {%x, %z, %x, %z};
        """,
        [Array(totals)],
        registers=REGISTERS,
    )
    assert report.findings == []
    assert totals.tolist() == [[16, 32, 16, 32]] * 2


def test_loops_and_branches_take_each_lane_its_own_way():
    """Lanes leave the loop after as many rounds as their number; blocks of a batch at different times."""
    result = np.zeros(96 * 32, np.uint32)
    report = launch(
        """
        mov.u32 %x, 0;
        add.u32 %y, %thread, %block;
        LOOP:
        setp.ge.u32 %p, %x, %y;
        @%p bra DONE;
        add.u32 %x, %x, 1;
        bra.uni LOOP;
        DONE:
        mad.lo.u32 %z, %block, 32, %thread;
        mad.wide.u32 %at, %z, 4, %p0;
        setp.eq.u32 %p, %thread, 3;
        @%p ret;
        st.global.b32 [%at], %x;
        """,
        [Array(result)],
        registers=REGISTERS,
        grid=96,
    )
    assert report.findings == []
    expected = np.add.outer(np.arange(96), np.arange(32))
    expected[:, 3] = 0
    assert (result.reshape(96, 32) == expected).all()
