"""The kernels of log_ratio and pair_loss compile for sm_80 and sm_90, without spills and within shared memory."""

import itertools

import pytest
import torch

from tests.kernels.aot import check_compiles, launches_of

pytest.importorskip("triton")
FORMS = list(
    itertools.product([7, 50257, 128256], [torch.float32, torch.bfloat16, torch.float16], [False, True], [None, 30.0])
)


@pytest.mark.parametrize(("vocabulary", "dtype", "bias", "softcap"), FORMS)
def test_slab_softmax_compiles(vocabulary, dtype, bias, softcap):
    from irlfast.kernels.slab import softmax

    z = torch.empty(2, -(-vocabulary // 16) * 16)[:, :vocabulary]  # as the slab allocates it
    targets = torch.zeros(2, dtype=torch.long)
    bias = torch.empty(vocabulary, dtype=dtype) if bias else None
    [launch] = launches_of(softmax, z, targets, bias, dtype, 1.0, softcap)
    # Two programs of 8 warps a multiprocessor, so that loads overlap.
    check_compiles(launch, vocabulary, dtype, registers=128)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "vocabulary", "size", "ref_size"), [(8192, 128256, 4096, 4096), (63, 50257, 96, 1000)])
def test_fused_projection_compiles(n, vocabulary, size, ref_size, dtype, bias, softcap):
    from irlfast.kernels.linear import token_logps

    def side(columns: int) -> tuple:
        shapes = (n, columns), (vocabulary, columns), (vocabulary,)
        hidden, weight, own = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        return hidden, weight, own if bias else None

    targets = torch.empty(n, dtype=torch.long, device="meta")
    launches = launches_of(token_logps, [side(size), side(ref_size)], targets, targets, 0.5, softcap)
    assert [launch.kernel.__name__ for launch in launches] == ["parts_kernel", "fold_kernel"]
    for launch in launches:
        check_compiles(launch, n, vocabulary, dtype)


@pytest.mark.parametrize("wanted", ["all", "hidden", "weight"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "vocabulary", "size"), [(8192, 128256, 4096), (63, 50257, 96)])
def test_skipping_forward_and_backward_compile(n, vocabulary, size, dtype, softcap, wanted):
    from irlfast.kernels.linear import tile_of, token_logps
    from irlfast.kernels.linear_backward import add_gradients

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    policy = empty(n, size, dtype=dtype), empty(vocabulary, size, dtype=dtype), empty(vocabulary, dtype=dtype)
    targets = empty(n, dtype=torch.long)
    tiles = empty(-(-vocabulary // tile_of(dtype).N), n)
    [forward, _] = launches_of(token_logps, [policy], targets, targets, 0.5, softcap, tiles)
    check_compiles(forward, n, vocabulary, dtype)
    sums = [
        empty(*tensor.shape) if wanted in ("all", name) else None
        for name, tensor in zip(("hidden", "weight", "bias"), policy, strict=True)
    ]
    statistics = empty(n), empty(n), tiles
    options = targets, targets, statistics, empty(n), 0.5, softcap, 1e-6
    [backward] = launches_of(add_gradients, *sums, policy, *options)
    check_compiles(backward, n, vocabulary, dtype)
