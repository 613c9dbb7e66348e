"""The kernels of log_ratio and pair_loss compile for sm_80 and sm_90, without spills and within shared memory."""

import pytest
import torch
from torch.torch_version import TorchVersion

pytest.importorskip("triton")

from irlfast.kernels import exponentials, heavy_tiles, linear
from irlfast.kernels.scale import scaled
from irlfast.kernels.slab import softmax
from irlfast.ops.pair_loss import triton_slab
from tests.helpers.aot import ARCHITECTURES, check_compiles, launches_of
from tests.helpers.tiers import sweep

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@sweep(vocabulary=[7, 50257, 128256], dtype=DTYPES, bias=[False, True], softcap=[None, 30.0])
def test_slab_softmax_compiles(vocabulary, dtype, bias, softcap):
    z = torch.empty(2, -(-vocabulary // 16) * 16)[:, :vocabulary]  # as the slab allocates it
    targets = torch.zeros(2, dtype=torch.long)
    bias = torch.empty(vocabulary, dtype=dtype) if bias else None
    for slopes in (False, True):
        [launch] = launches_of(softmax, z, targets, bias, dtype, 1.0, softcap, slopes)
        registers = 65536 // (32 * launch.options["num_warps"])  # as many as a multiprocessor has for one program
        check_compiles(launch, vocabulary, dtype, registers=min(registers, 255))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_with_a_factor_compiles(dtype):
    for count in (8192, 8191):
        [launch] = launches_of(scaled, torch.empty(count), torch.empty(()), dtype)
        check_compiles(launch, count, dtype)


SHAPES = [(8192, 128256, 4096, 4096), (63, 50257, 96, 1000)]  # rows, vocabulary, hidden sizes of policy and reference


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def head_inputs(n: int, vocabulary: int, size: int, dtype: torch.dtype, bias: bool) -> tuple:
    head = empty(vocabulary, size, dtype=dtype)
    return empty(n, size, dtype=dtype), head, empty(vocabulary, dtype=dtype) if bias else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", ["2.9.1", torch.__version__])
def test_torch_multiplies_narrow_factors_into_fp32_as_the_slab_asks(dtype, version, monkeypatch):
    """No CPU kernel multiplies so, but torch's shape functions take the same arguments."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    n, vocabulary, size = 63, 50257, 96
    hidden, weight, _ = head_inputs(n, vocabulary, size, dtype, bias=False)
    z = empty(n, 50272)[:, :vocabulary]
    slope = z.view(dtype)[:, :vocabulary]
    triton_slab.logits(hidden, weight, z)
    assert triton_slab.times_weight(slope, weight).shape == (n, size)
    triton_slab.add_times_hidden(empty(vocabulary, size), slope, hidden.float(), new=True)
    triton_slab.add_times_hidden(empty(vocabulary, size), slope, hidden.float(), new=False)
    with pytest.raises(RuntimeError, match="shape"):
        triton_slab.add_times_hidden(empty(vocabulary, size + 1), slope, hidden.float(), new=False)


@sweep(shape=SHAPES, dtype=DTYPES, bias=[False, True], softcap=[None, 30.0], architecture=ARCHITECTURES)
def test_fused_projection_compiles(shape, dtype, bias, softcap, architecture, monkeypatch):
    n, vocabulary, size, ref_size = shape
    monkeypatch.setattr(linear, "capability", lambda _: divmod(architecture, 10))
    targets = empty(n, dtype=torch.long)
    models = [head_inputs(n, vocabulary, columns, dtype, bias) for columns in (size, ref_size)]
    launches = launches_of(linear.token_logps, models, targets, targets, 0.5, softcap)
    assert [launch.kernel.__name__ for launch in launches] == ["parts_kernel", "fold_kernel"]
    for launch in launches:
        multiplies = launch.kernel.__name__ == "parts_kernel" and dtype != torch.float32
        check_compiles(launch, n, vocabulary, dtype, architectures=[architecture], multiplies=multiplies)


@sweep(shape=SHAPES, bias=[False, True], softcap=[None, 30.0], architecture=ARCHITECTURES)
def test_slab_by_exponentials_compiles(shape, bias, softcap, architecture, monkeypatch):
    n, vocabulary, size, _ = shape
    monkeypatch.setattr(linear, "capability", lambda _: divmod(architecture, 10))
    inputs = head_inputs(n, vocabulary, size, torch.bfloat16, bias)
    slab = empty(n, -(-vocabulary // 16) * 16, dtype=torch.bfloat16)[:, :vocabulary]
    targets = empty(n, dtype=torch.long)
    launches = launches_of(exponentials.exponentials, *inputs, targets, slab, 0.5, softcap, True)
    for launch in launches:
        multiplies = launch.kernel.__name__ == "exponentials_kernel"
        check_compiles(launch, n, vocabulary, architectures=[architecture], multiplies=multiplies)


@sweep(shape=SHAPES, architecture=ARCHITECTURES)
def test_products_over_heavy_tiles_compile(shape, architecture):
    n, vocabulary, size, _ = shape
    tiles, blocks = -(-vocabulary // 128), -(-n // 64)
    hidden, head, _ = head_inputs(n, vocabulary, size, torch.bfloat16, bias=False)
    slab = empty(n, -(-vocabulary // 16) * 16, dtype=torch.bfloat16)[:, :vocabulary]
    sizes = [(blocks, tiles), (blocks,), (tiles, blocks), (tiles,)]
    heavy = heavy_tiles.HeavyTiles(*(empty(*shape, dtype=torch.int32) for shape in sizes))
    rows = empty(n), empty(n, dtype=torch.long), empty(n), empty(n)
    launches = launches_of(heavy_tiles.heavy_tiles, empty(tiles, n), *rows, 0.5, 1e-3)
    products = launches_of(heavy_tiles.times_weight, slab, head, heavy)
    for new in (False, True):
        products += launches_of(heavy_tiles.add_times_hidden, empty(vocabulary, size), slab, hidden, heavy, new)
    for launch in launches:
        check_compiles(launch, n, vocabulary, architectures=[architecture])
    for launch in products:
        check_compiles(launch, n, vocabulary, architectures=[architecture], multiplies=True)
