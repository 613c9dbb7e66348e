"""Each check of the interpreter: a kernel with the mistake is reported at its line, and one without it is not."""

from typing import NamedTuple

import numpy as np
import pytest

from tests.ptx.machine import Report
from tests.ptx.snippets import Array, launch

REGISTERS = """
.reg .b64 %at, %to, %d; .reg .b32 %x, %y, %z, %mine, %other, %w<4>, %c<8>; .reg .pred %p, %q;
"""
SHARED = ".shared .align 1024 .b8 buffer[16384];"
# %mine and %other: addresses of 4 bytes of shared memory, the thread's own and those of the thread 32 further on.
PLACES = """
mov.u32 %x, buffer;
mad.lo.u32 %mine, %thread, 4, %x;
xor.b32 %other, %thread, 32;
mad.lo.u32 %other, %other, 4, %x;
"""
# %at: the address of the thread's 4 bytes among those of all blocks. %to: among 64 that all blocks share.
ADDRESSES = """
mad.lo.u32 %x, %block, 64, %thread;
mad.wide.u32 %at, %x, 4, %p0;
mad.wide.u32 %to, %thread, 4, %p0;
"""


class Check(NamedTuple):
    """``wrong`` has one line that ``right`` does not need, or lacks one. Lines that begin with - are only in the wrong
    kernel, those with + only in the right one."""

    mistake: str
    body: str
    at: str  # in the line that is reported
    threads: int = 64
    grid: int = 1
    fresh: bool = False


CHECKS = {
    "a store after the end": Check(
        "global memory out of bounds: thread 63 (warp 1) of block 0, 4 bytes beyond the end of p0",
        f"{ADDRESSES}\n- st.global.b32 [%to+4], 5;\n+ st.global.b32 [%to], 5;",
        "st.global",
    ),
    "a load before the beginning": Check(
        "global memory out of bounds: thread 0 (warp 0) of block 0, address",
        f"{ADDRESSES}\n- ld.global.b32 %x, [%to+-4];\n+ ld.global.b32 %x, [%to];",
        "ld.global",
    ),
    "a copy after the end": Check(
        "global memory out of bounds: thread 63 (warp 1) of block 0, 4 bytes beyond the end of p0",
        f"{PLACES}{ADDRESSES}\n- cp.async.ca.shared.global [%mine], [%to+4], 4;\n"
        "+ cp.async.ca.shared.global [%mine], [%to], 4;\ncp.async.wait_all;",
        "cp.async.ca",
    ),
    "an atomic addition after the end": Check(
        "global memory out of bounds: thread 63 (warp 1) of block 0, 4 bytes beyond the end of p0",
        f"{ADDRESSES}\n- red.global.gpu.relaxed.add.u32 [%to+4], 5;\n+ red.global.gpu.relaxed.add.u32 [%to], 5;",
        "red.global",
    ),
    "an odd address": Check(
        "misaligned: thread 0 (warp 0) of block 0, address",
        "- ld.global.v2.b32 {%w0, %w1}, [%p0+4];\n+ ld.global.v2.b32 {%w0, %w1}, [%p0+8];",
        "ld.global",
    ),
    "shared memory after the end": Check(
        "shared memory out of bounds: thread 63 (warp 1) of block 0, byte 16384 of 16384",
        f"{PLACES}\n- st.shared.b32 [%mine+16132], 1;\n+ st.shared.b32 [%mine+16128], 1;",
        "st.shared",
    ),
    "a read of another warp's write": Check(
        "race, read after write: thread 0 (warp 0) of block 0, byte 128 of shared memory, with thread 32 (warp 1)",
        f"{PLACES}\nst.shared.b32 [%mine], %thread;\n+ bar.sync 0;\nld.shared.b32 %y, [%other];",
        "ld.shared",
    ),
    "a write over another warp's read": Check(
        "race, write after read: thread 0 (warp 0) of block 0, byte 128 of shared memory, with thread 32 (warp 1)",
        f"{PLACES}\nst.shared.b32 [%mine], %thread;\nbar.sync 0;\nld.shared.b32 %y, [%mine];\n+ bar.sync 0;\n"
        "st.shared.b32 [%other], %y;",
        "st.shared.b32 [%other]",
    ),
    "a write over the reads of several warps": Check(
        "race, write after read: thread 0 (warp 0) of block 0, byte 0 of shared memory, with thread",
        f"{PLACES}\nst.shared.b32 [%mine], %thread;\nbar.sync 0;\nld.shared.b32 %y, [buffer];\n+ bar.sync 0;\n"
        "setp.eq.u32 %p, %thread, 0;\n@%p st.shared.b32 [buffer], 3;",
        "st.shared.b32 [buffer]",
    ),
    "two instructions that store the same value": Check(
        "race, write after write: thread 0 (warp 0) of block 0, byte 128 of shared memory, with thread 32 (warp 1)",
        f"{PLACES}\nst.shared.b32 [%mine], 7;\n+ bar.sync 0;\nst.shared.b32 [%other], 7;",
        "st.shared.b32 [%other]",
    ),
    "other values in one place at once": Check(
        "threads store different values at once: thread 0 (warp 0) of block 0, byte 0 of shared memory",
        "- st.shared.b32 [buffer], %thread;\n+ st.shared.b32 [buffer], %block;",
        "st.shared",
    ),
    "lanes of a warp without its barrier": Check(
        "race, read after write: thread 0 (warp 0) of block 0, byte 4 of shared memory, with thread 1 (warp 0)",
        f"{PLACES}\nst.shared.b32 [%mine], %thread;\n+ bar.warp.sync -1;\nxor.b32 %y, %thread, 1;\n"
        "mad.lo.u32 %y, %y, 4, buffer;\nld.shared.b32 %z, [%y];",
        "ld.shared",
    ),
    "lanes of a warp that overwrite what others read": Check(
        "race, write after read: thread 0 (warp 0) of block 0, byte 4 of shared memory, with thread 1 (warp 0)",
        f"{PLACES}\nst.shared.b32 [%mine], %thread;\nbar.warp.sync -1;\nld.shared.b32 %z, [%mine];\n"
        "+ bar.warp.sync -1;\nxor.b32 %y, %thread, 1;\nmad.lo.u32 %y, %y, 4, buffer;\nst.shared.b32 [%y], %z;",
        "st.shared.b32 [%y]",
    ),
    "a barrier of the warp does for its own lanes alone": Check(
        "race, read after write: thread 0 (warp 0) of block 0, byte 128 of shared memory, with thread 32 (warp 1)",
        f"{PLACES}\nst.shared.b32 [%mine], %thread;\n- bar.warp.sync -1;\n+ bar.sync 0;\nld.shared.b32 %y, [%other];",
        "ld.shared",
    ),
    "blocks that write the same value": Check(
        "race between blocks, two write or one reads: thread 0 (warp 0) of block 0, byte 0 of p0, with thread 0 (warp 0"
        ") of block 1",
        f"{ADDRESSES}\n- st.global.b32 [%to], 1;\n+ st.global.b32 [%at], 1;",
        "st.global",
        grid=2,
    ),
    "blocks far apart that write the same value": Check(
        "race between blocks, two write or one reads",
        f"{ADDRESSES}\n- st.global.b32 [%to], 1;\n+ st.global.b32 [%at], 1;",
        "st.global",
        grid=300,
    ),
    "a block that reads what another writes": Check(
        "race between blocks, read and write",
        f"{ADDRESSES}\nst.global.b32 [%at], 1;\n- ld.global.b32 %y, [%to];\n+ ld.global.b32 %y, [%at];",
        "ld.global",
        grid=2,
    ),
    "a block that writes what another has read": Check(
        "race between blocks, two write or one reads",
        f"{ADDRESSES}\n- ld.global.b32 %y, [%to];\n+ ld.global.b32 %y, [%at];\nst.global.b32 [%at], 1;",
        "st.global",
        grid=2,
    ),
    "a plain write beside atomic additions": Check(
        "race between blocks",
        f"{ADDRESSES}\nred.global.gpu.relaxed.add.u32 [%to], 1;\n- st.global.b32 [%to], 1;",
        "st.global",
        grid=2,
    ),
    "a read of what nobody wrote": Check(
        "memory is read that nobody wrote: thread 0 (warp 0) of block 0, byte 0 of shared memory",
        f"{PLACES}\n+ st.shared.b32 [%mine], %thread;\nld.shared.b32 %y, [%mine];",
        "ld.shared",
    ),
    "a read of fresh memory": Check(
        "memory is read that nobody wrote: thread 0 (warp 0) of block 0, byte 0 of p0",
        f"{ADDRESSES}\n+ st.global.b32 [%to], %thread;\nld.global.b32 %y, [%to];",
        "ld.global",
        fresh=True,
    ),
    "an atomic addition to fresh memory": Check(
        "memory is read that nobody wrote: thread 0 (warp 0) of block 0, byte 0 of p0",
        f"{ADDRESSES}\n+ st.global.b32 [%to], %thread;\nred.global.gpu.relaxed.add.u32 [%to], 1;",
        "red.global",
        fresh=True,
    ),
    "a read before the copy has ended": Check(
        "memory is touched while cp.async fills it: thread 0 (warp 0) of block 0, byte 0 of shared memory",
        f"{PLACES}{ADDRESSES}\ncp.async.ca.shared.global [%mine], [%to], 4;\ncp.async.commit_group;\n"
        "+ cp.async.wait_group 0;\nst.shared.b32 [%mine], 1;\ncp.async.wait_all;",
        "st.shared",
    ),
    "a copy that nothing waits for": Check(
        "a cp.async that nothing waits for",
        f"{PLACES}{ADDRESSES}\ncp.async.ca.shared.global [%mine], [%to], 4;\n+ cp.async.wait_all;",
        "cp.async.ca",
    ),
    "a copy that another warp reads without a barrier": Check(
        "race, read after write: thread 0 (warp 0) of block 0, byte 128 of shared memory, with thread 32 (warp 1)",
        f"{PLACES}{ADDRESSES}\ncp.async.ca.shared.global [%mine], [%to], 4;\ncp.async.wait_all;\n+ bar.sync 0;\n"
        "ld.shared.b32 %y, [%other];",
        "ld.shared",
    ),
    "a copy over what another warp reads": Check(
        "race, cp.async over memory in use: thread 0 (warp 0) of block 0, byte 128 of shared memory",
        f"{PLACES}{ADDRESSES}\nst.shared.b32 [%mine], 1;\nbar.sync 0;\nld.shared.b32 %y, [%mine];\n+ bar.sync 0;\n"
        "cp.async.ca.shared.global [%other], [%to], 4;\ncp.async.wait_all;",
        "cp.async.ca",
    ),
    "two copies to one place": Check(
        "two cp.async fill the same memory",
        f"{PLACES}{ADDRESSES}\ncp.async.ca.shared.global [%mine], [%to], 4;\n+ cp.async.wait_all;\n"
        "cp.async.ca.shared.global [%mine], [%to], 4;\ncp.async.wait_all;",
        "cp.async.ca",
    ),
    "a register that nothing wrote": Check(
        "a register is read that nothing wrote: %y",
        "+ mov.u32 %y, 3;\nadd.u32 %x, %y, 1;",
        "add.u32",
    ),
    "a register that some lanes have not written": Check(
        "a register is read that nothing wrote: %y, thread 9 (warp 0) of block 0, 55 lanes",
        "setp.lt.u32 %p, %thread, 9;\n@%p mov.u32 %y, 3;\n+ @!%p mov.u32 %y, 4;\nadd.u32 %x, %y, 1;",
        "add.u32",
    ),
    "a barrier for a part of a warp": Check(
        "a barrier is reached by a part of a warp: without thread 9 (warp 0) of block 0",
        "- setp.ge.u32 %p, %thread, 9;\n+ setp.ge.u32 %p, %thread, 64;\n@%p bra AFTER;\nbar.sync 0;\nAFTER:",
        "bar.sync",
    ),
    "two barriers that meet": Check(
        "threads of a block wait at different barriers: block 0 waits at snippet.cu:12 and snippet.cu:15",
        "- setp.ge.u32 %p, %thread, 32;\n+ setp.ge.u32 %p, %thread, 64;\n@%p bra OTHER;\nbar.sync 0;\nbra.uni DONE;\n"
        "OTHER:\nbar.sync 0;\nDONE:",
        "bar.sync",
    ),
    "parameters after the end": Check(
        "parameters out of bounds",
        "mov.b64 %d, p0;\n- ld.param.b32 %x, [%d+8];\n+ ld.param.b32 %x, [%d+4];",
        "ld.param",
    ),
}  # fmt: skip


def version(body: str, wrong: bool) -> str:
    """The lines of one of the two kernels."""
    lines = (line.strip() for line in body.splitlines())
    kept = (line for line in lines if not line.startswith("+ " if wrong else "- "))
    return "\n".join(line[2:] if line[:2] in ("- ", "+ ") else line for line in kept if line)


def run_version(check: Check, wrong: bool) -> tuple[Report, str]:
    memory = np.zeros(64 * check.grid, np.uint32)
    body = version(check.body, wrong)
    options = {"registers": REGISTERS, "shared": SHARED, "grid": check.grid, "threads": check.threads}
    return launch(body, [Array(memory, check.fresh)], **options), body


def line_of(body: str, text: str) -> list[int]:
    return [number for number, line in enumerate(body.splitlines(), 10) if text in line]


@pytest.mark.parametrize("name", CHECKS)
def test_a_mistake_is_reported_at_its_line_and_its_repair_is_not(name):
    check = CHECKS[name]
    report, body = run_version(check, wrong=True)
    lines = [f"snippet, snippet.cu:{number}: {check.mistake}" for number in line_of(body, check.at)]
    assert any(finding.startswith(line) for finding in report.findings for line in lines), report.findings
    report, _ = run_version(check, wrong=False)
    assert report.findings == []


def test_a_vector_across_the_end_is_reported():
    memory = np.zeros(16, np.uint32)[:14]
    report = launch("ld.global.v4.b32 {%w0, %w1, %w2, %w3}, [%p0+48];", [Array(memory)], registers=REGISTERS)
    [finding] = report.findings
    assert "global memory out of bounds: thread 0 (warp 0) of block 0, 8 bytes beyond the end of p0" in finding


def test_a_mistake_that_recurs_is_one_finding_with_its_count():
    body = "mov.u32 %x, 0;\nLOOP:\nadd.u32 %z, %y, 1;\nadd.u32 %x, %x, 1;\nsetp.lt.u32 %p, %x, 5;\n@%p bra LOOP;"
    once = launch(body, registers=REGISTERS)
    assert once.findings == ["snippet, snippet.cu:12: a register is read that nothing wrote: %y [add.u32 %z, %y, 1]"]
    [finding] = launch("ld.shared.b32 %y, [buffer];\n" * 3, registers=REGISTERS, shared=SHARED).findings[:1]
    assert "snippet.cu:10" in finding


# ---------------------------------------------------------------- products of warpgroups

PRODUCT = """
mad.lo.u32 %x, %thread, 16, buffer;
st.shared.v4.b32 [%x], {{%block, %block, %block, %block}};
st.shared.v4.b32 [%x+2048], {{%block, %block, %block, %block}};
{proxy_fence}
{barrier}
mov.u32 %y, buffer;
shr.u32 %y, %y, 4;
cvt.u64.u32 %d, %y;
add.u64 %d, %d, 0x1000080000;
mov.b32 %c0, 0f00000000; mov.b32 %c1, 0f00000000; mov.b32 %c2, 0f00000000; mov.b32 %c3, 0f00000000;
{fence}
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%c0, %c1, %c2, %c3}}, %d, %d, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
{before_wait}
wgmma.wait_group.sync.aligned 0;
add.f32 %c4, %c0, %c1;
"""
SOUND = {
    "proxy_fence": "fence.proxy.async.shared::cta;",
    "barrier": "bar.sync 0;",
    "fence": "wgmma.fence.sync.aligned;",
    "before_wait": "",
}
PRODUCT_MISTAKES = {
    "a product without fence.proxy.async after the writes": {"proxy_fence": ""},
    "race, read after write": {"barrier": ""},
    "a product without wgmma.fence: found none before": {"fence": ""},
    "a product without wgmma.fence: %c0 was touched after it": {"fence": "wgmma.fence.sync.aligned; mov.b32 %c0, 1;"},
    "an accumulator is read before wgmma.wait_group: %c1": {"before_wait": "add.f32 %c4, %c1, %c1;"},
    "memory changes while a wgmma reads it": {"before_wait": "bar.sync 0; st.shared.b32 [buffer], %block;"},
    "lanes of a warpgroup are missing": {"fence": "wgmma.fence.sync.aligned; setp.lt.u32 %p, %thread, 96; @!%p ret;"},
}  # fmt: skip


def launch_product(**changes: str) -> Report:
    body = PRODUCT.format(**SOUND | changes)
    return launch(body, registers=REGISTERS, shared=SHARED, threads=128)


def test_a_sound_product_is_not_reported():
    assert launch_product().findings == []


@pytest.mark.parametrize("mistake", PRODUCT_MISTAKES)
def test_a_mistake_of_a_product_is_reported(mistake):
    findings = launch_product(**PRODUCT_MISTAKES[mistake]).findings
    assert any(mistake in finding for finding in findings), findings


def test_products_that_read_memory_after_the_end_are_reported():
    body = PRODUCT.format(**SOUND).replace("0x1000080000", "0x1000080090")  # 2,304 bytes on
    short = ".shared .align 1024 .b8 buffer[4096];"
    [finding] = launch(body, registers=REGISTERS, shared=short, threads=128).findings[:1]
    assert "shared memory out of bounds" in finding


# ---------------------------------------------------------------- what is allowed


def test_threads_of_a_block_may_store_one_value_by_one_instruction():
    """Triton does so where a tensor is smaller than the block."""
    assert launch("st.shared.b32 [buffer], 7;", registers=REGISTERS, shared=SHARED, threads=128).findings == []


def test_warps_that_have_left_are_not_missed_at_a_barrier():
    body = "setp.ge.u32 %p, %thread, 32;\n@%p ret;\nbar.sync 0;"
    assert launch(body, registers=REGISTERS, threads=64).findings == []


def test_views_of_one_tensor_are_one_allocation():
    memory = np.zeros(64, np.uint32)
    body = "mad.wide.u32 %at, %thread, 4, %p0;\nst.global.b32 [%at+128], 1;"
    report = launch(body, [Array(memory[:40]), Array(memory[32:])], registers=REGISTERS)
    assert report.findings == [] and list(report.counts.memory) == ["p0+p1"]
