"""Products of tensor cores against fp64, with fragments and shared memory laid out by the manual's own formulas."""

import numpy as np
import pytest
import torch

from tests.ptx.snippets import Array, launch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
LANES = [(lane, lane >> 2, lane & 3) for lane in range(32)]  # lane, group, number in the group


def random(rows: int, columns: int, kind: str, seed: int) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "tf32":
        return (values.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return values.to(DTYPES[kind])


def words(values: torch.Tensor) -> np.ndarray:
    """The bits of numbers as 32-bit words."""
    return np.frombuffer(values.contiguous().view(torch.uint8).numpy().tobytes(), np.uint32)


def pair(first: torch.Tensor, second: torch.Tensor) -> int:
    return int(words(torch.stack([first, second]))[0])


# ---------------------------------------------------------------- mma


def place_of_a(group: int, inside: int, i: int) -> tuple[int, int]:
    """Row and column of number i of a lane's fragment of A, for 16-bit numbers."""
    return group + (0 if i < 2 or 4 <= i < 6 else 8), inside * 2 + (i & 1) + (8 if i >= 4 else 0)


def fragments_16(a: torch.Tensor, b: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    of_a, of_b = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    for lane, group, inside in LANES:
        for r in range(4):
            of_a[lane, r] = pair(*(a[place_of_a(group, inside, 2 * r + h)] for h in range(2)))
        for r in range(2):
            of_b[lane, r] = pair(*(b[inside * 2 + h + 8 * r, group] for h in range(2)))
    return of_a, of_b


def fragments_tf32(a: torch.Tensor, b: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    of_a, of_b = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    for lane, group, inside in LANES:
        places = [(group, inside), (group + 8, inside), (group, inside + 4), (group + 8, inside + 4)]
        of_a[lane] = words(torch.stack([a[place] for place in places]))
        of_b[lane] = words(torch.stack([b[inside, group], b[inside + 4, group]]))
    return of_a, of_b


@pytest.mark.parametrize(
    ("shape", "kind", "depth"), [("m16n8k16", "bf16", 16), ("m16n8k16", "f16", 16), ("m16n8k8", "tf32", 8)]
)
def test_a_warp_multiplies_its_fragments(shape, kind, depth):
    a, b = random(16, depth, kind, 0), random(depth, 8, kind, 1)
    c = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    of_a, of_b = (fragments_tf32 if kind == "tf32" else fragments_16)(a, b)
    of_c, result = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    for lane, group, inside in LANES:
        for i in range(4):
            of_c[lane, i] = c[group + 8 * (i >> 1), inside * 2 + (i & 1)]
    if kind == "tf32":
        of_a |= np.uint32(0x1FFF)  # the lowest bits do not count
    registers = "{%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1, %c2, %c3}"
    report = launch(
        f"""
        mad.wide.u32 %at, %thread, 16, %p0;
        ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%at];
        mad.wide.u32 %at, %thread, 8, %p1;
        ld.global.v2.b32 {{%b0, %b1}}, [%at];
        mad.wide.u32 %at, %thread, 16, %p2;
        ld.global.v4.b32 {{%c0, %c1, %c2, %c3}}, [%at];
        mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {registers};
        mad.wide.u32 %at, %thread, 16, %p3;
        st.global.v4.b32 [%at], {{%d0, %d1, %d2, %d3}};
        """,
        [Array(of_a), Array(of_b), Array(of_c), Array(result)],
        registers=".reg .b64 %at; .reg .b32 %a<4>, %b<2>, %c<4>, %d<4>;",
    )
    assert report.findings == []
    assert report.counts.multiply_adds == 16 * 8 * depth
    expected = (a.double() @ b.double() + c.double()).float()
    for lane, group, inside in LANES:
        for i in range(4):
            assert result[lane, i] == expected[group + 8 * (i >> 1), inside * 2 + (i & 1)].item(), (lane, i)


# ---------------------------------------------------------------- fragments in shared memory


def matrix_body(count: int, transposed: bool, storing: bool) -> str:
    """Lane L has the address of row L of the matrices, 48 bytes apart, and copies it in or out."""
    registers = ", ".join(f"%d{i}" for i in range(count))
    suffix = f"sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    copy_rows = "ld.global.v4.b32 {%w0, %w1, %w2, %w3}, [%at];\nst.shared.v4.b32 [%row], {%w0, %w1, %w2, %w3};"
    rows_out = "ld.shared.v4.b32 {%w0, %w1, %w2, %w3}, [%row];\n@%p st.global.v4.b32 [%at], {%w0, %w1, %w2, %w3};"
    fragments = "\n".join(
        f"{'ld' if storing else 'st'}.global.b32 {f'%d{i}, [%to+{4 * i}]' if storing else f'[%to+{4 * i}], %d{i}'};"
        for i in range(count)
    )
    start = f"""
        mov.u32 %row, buffer;
        mad.lo.u32 %row, %thread, 48, %row;
        mad.wide.u32 %at, %thread, 16, %p0;
        mad.wide.u32 %to, %thread, {4 * count}, %p1;
        setp.lt.u32 %p, %thread, {8 * count};
    """
    if storing:
        return f"""{start}
            st.shared.v4.b32 [%row], {{%thread, %thread, %thread, %thread}};
            bar.warp.sync -1;
            {fragments}
            stmatrix.{suffix} [%row], {{{registers}}};
            bar.warp.sync -1;
            {rows_out}
        """
    return f"""{start}
        {copy_rows}
        bar.warp.sync -1;
        ldmatrix.{suffix} {{{registers}}}, [%row];
        {fragments}
    """


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("storing", [False, True])
def test_fragments_are_loaded_and_stored_by_rows_or_columns(count, transposed, storing):
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8) * 5 + 1
    rows = np.zeros((32, 8), np.uint16)
    rows[: 8 * count] = matrices.reshape(-1, 8)
    fragments = np.zeros((32, count, 2), np.uint16)
    for lane, group, inside in LANES:
        for number, matrix in enumerate(matrices):
            source = matrix.T if transposed else matrix
            fragments[lane, number] = source[group, 2 * inside : 2 * inside + 2]
    given, result = (fragments, np.zeros_like(rows)) if storing else (rows, np.zeros_like(fragments))
    arrays = [Array(result), Array(given)] if storing else [Array(given), Array(result)]
    report = launch(
        matrix_body(count, transposed, storing),
        arrays,
        registers=".reg .b64 %at, %to; .reg .b32 %row, %d<4>, %w<4>; .reg .pred %p;",
        shared=".shared .align 16 .b8 buffer[1536];",
    )
    assert report.findings == []
    assert (result == (rows if storing else fragments)).all()


# ---------------------------------------------------------------- wgmma

HALF = 16384  # bytes of shared memory for each operand
SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row, by the mode of swizzling


def chunk_in_row(chunk: int, row: int, span: int) -> int:
    """The place of a 16-byte chunk in its row, after swizzling."""
    return chunk ^ {16: 0, 32: row // 4 % 2, 64: row // 2 % 4, 128: row % 8}[span]


def laid_out(matrix: torch.Tensor, mode: int, mn_major: bool, size: int) -> tuple[np.ndarray, int, int]:
    """The bytes of an operand [mn, k] in shared memory, and the descriptor's two distances.

    Memory is tiled by 8 rows of ``span`` bytes. Rows are those of the matrix, or its columns if ``mn_major``.
    """
    span, item = SPANS[mode], matrix.element_size()
    across, along = (matrix.shape[1], matrix.shape[0]) if mn_major else matrix.shape
    raw, per_row = np.zeros(size, np.uint8), span // item
    # Tiles lie side by side along the rows first, then across: distances of tiles along and across.
    along_tiles = -(-along // per_row)
    next_along, next_across = 8 * span, 8 * span * along_tiles
    bytes_of = matrix.contiguous().view(torch.uint8).numpy().reshape(*matrix.shape, item)
    for i in range(across):
        for j in range(along):
            tile = j // per_row * next_along + i // 8 * next_across
            chunk, rest = divmod(j % per_row * item, 16)
            at = tile + i % 8 * span + chunk_in_row(chunk, i % 8, span) * 16 + rest
            raw[at : at + item] = bytes_of[(j, i) if mn_major else (i, j)]
    leading, stride = next_along, next_across
    return raw, *((stride, leading) if mn_major and mode == 0 else (leading, stride))


def descriptor(mode: int, leading: int, stride: int) -> int:
    return leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


COPY = "\n".join(
    f"""
    add.u32 %x, %thread, {128 * step};
    mad.wide.u32 %at, %x, 16, %p0;
    ld.global.v4.b32 {{%w0, %w1, %w2, %w3}}, [%at];
    mad.lo.u32 %x, %x, 16, %smem;
    st.shared.v4.b32 [%x], {{%w0, %w1, %w2, %w3}};
    """
    for step in range(16)
)


def product_body(
    kind: str, columns: int, a: str, descriptors: list[int], flags: str, depth: int, rounds: int = 1
) -> str:
    results = ", ".join(f"%d{i}" for i in range(columns // 2))
    clear = "\n".join(f"mov.b32 %d{i}, 0f00000000;" for i in range(columns // 2))
    out = "\n".join(f"st.global.b32 [%to+{4 * i}], %d{i};" for i in range(columns // 2))
    one = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} {{{results}}}, {a}, %db, 1, 1, 1{flags};"
    )
    return f"""
        mov.u32 %smem, buffer;
        {COPY}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        {clear}
        mad.wide.u32 %at, %thread, 16, %p2;
        ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%at];
        shr.u32 %x, %smem, 4;
        cvt.u64.u32 %start, %x;
        add.u64 %da, %start, {descriptors[0]};
        add.u64 %db, %start, {descriptors[1]};
        wgmma.fence.sync.aligned;
        {one * rounds}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %to, %thread, {2 * columns}, %p1;
        {out}
    """


def operand_in_memory(
    kind: str, rows: int, mode: int, mn_major: bool, seed: int
) -> tuple[torch.Tensor, np.ndarray, int]:
    """An operand [rows, depth], the memory that it lies in, and its descriptor for a memory that starts at 0.

    A swizzled row along K may be longer than a product is deep. The operand is then the last part of it.
    """
    item = 4 if kind == "tf32" else 2
    depth = 32 // item
    whole = random(rows, depth if mn_major or mode == 0 else SPANS[mode] // item, kind, seed)
    memory, leading, stride = laid_out(whole, mode, mn_major, HALF)
    start = (whole.shape[1] - depth) * item
    return whole[:, -depth:], memory, descriptor(mode, leading, stride) + (start >> 4)


def check_product(kind: str, mode: int, majors: tuple[bool, bool], columns: int, from_registers: bool = False) -> None:
    a, memory_a, first = operand_in_memory(kind, 64, mode, majors[0], 3)
    b, memory_b, second = operand_in_memory(kind, columns, mode, majors[1], 4)
    depth = a.shape[1]
    memory = np.concatenate([memory_a, memory_b])
    of_a, result = np.zeros((128, 4), np.uint32), np.zeros((128, columns // 2), np.float32)
    if from_registers:
        of_a = np.concatenate([fragments_16(a[row : row + 16], b.T)[0] for row in range(0, 64, 16)])
    flags = "" if kind == "tf32" else ", " + ", ".join(str(int(m)) for m in (majors[1:] if from_registers else majors))
    source = "{%a0, %a1, %a2, %a3}" if from_registers else "%da"
    report = launch(
        product_body(kind, columns, source, [first, second + (HALF >> 4)], flags, depth, rounds=2),
        [Array(memory), Array(result), Array(of_a)],
        registers=f".reg .b64 %at, %to, %start, %da, %db; .reg .b32 %x, %smem, %w<4>, %a<4>, %d<{columns // 2}>;",
        shared=f".shared .align 1024 .b8 buffer[{2 * HALF}];",
        threads=128,
    )
    assert report.findings == []
    assert report.counts.multiply_adds == 2 * 64 * columns * depth
    expected = 2 * (a.double() @ b.double().T).numpy()
    for thread in range(128):
        warp, group, inside = thread // 32, thread % 32 >> 2, thread & 3
        for i in range(columns // 2):
            row, column = 16 * warp + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * inside + i % 2
            assert abs(result[thread, i] - expected[row, column]) <= 3e-7 * abs(expected[row, column])


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("majors", [(False, False), (True, False), (False, True), (True, True)])
def test_a_warpgroup_multiplies_operands_in_every_layout(mode, majors):
    check_product("bf16", mode, majors, 64)


@pytest.mark.parametrize(
    ("kind", "columns", "from_registers"),
    [("f16", 8, False), ("f16", 32, True), ("bf16", 128, True), ("tf32", 16, False)],
)
def test_a_warpgroup_multiplies_numbers_of_each_type(kind, columns, from_registers):
    check_product(kind, 1, (False, False), columns, from_registers)
