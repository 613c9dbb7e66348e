"""The kernels in CUDA C++ take rows that begin anywhere in memory, and touch no other memory."""

import pytest
import torch

from irlfast import native
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.logits import cuda_rows
from irlfast.ops.pair_loss import cpu_slab, cuda_slab
from tests.helpers.tiers import sweep
from tests.kernels.device import DEVICE

VOCABULARIES = [1, 2, 7, 9, 16, 31, 64, 1000, 5001]


@pytest.fixture(autouse=True)
def needs_module():
    if getattr(native.cuda, "device", None) != DEVICE:
        pytest.skip("irlfast._cuda is not built here")


def framed(rows: torch.Tensor, offset: int, distance: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``rows`` surrounded by NaN, ``offset`` elements from a 16-byte boundary; and the whole memory."""
    n, vocabulary = rows.shape
    memory = torch.full((offset + n * distance + 32,), float("nan"), dtype=rows.dtype, device=DEVICE)
    inside = memory[offset:].as_strided((n, vocabulary), (distance, 1))
    inside.copy_(rows)
    return inside, memory


def untouched(memory: torch.Tensor, inside: torch.Tensor) -> bool:
    """Return whether all elements outside the rows are still NaN."""
    rest = memory.clone()
    rest.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(float("nan"))
    return bool(rest.isnan().all())


@sweep(vocabulary=VOCABULARIES, dtype=[torch.float32, torch.bfloat16, torch.float16], offset=range(8))
def test_rows_may_begin_at_any_address(vocabulary, dtype, offset):
    random = torch.Generator().manual_seed(offset)
    plain = (torch.randn(3, vocabulary, generator=random) * 3).to(dtype).to(DEVICE)
    targets = torch.tensor([0, -100, vocabulary - 1], device=DEVICE)
    logits, memory = framed(plain, offset, vocabulary + offset)
    reference, _ = framed(plain.float(), 0, vocabulary)
    logps, lse, ref_logps = cuda_rows.token_logps(logits, targets, reference, 0.5, None)
    exact = torch.log_softmax(plain.double() * 0.5, 1)
    expected = torch.stack([exact[0, 0], exact.new_zeros(()), exact[2, -1]])
    for actual in (logps, ref_logps):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=2e-6)
    upstream = torch.tensor([1.0, 1.0, -2.0], device=DEVICE)
    gradient = 0.5 * upstream[:, None] * (torch.nn.functional.one_hot(targets.clamp(min=0), vocabulary) - exact.exp())
    gradient[1] = 0
    frames = [framed(torch.zeros_like(plain), *place) for place in ((offset, vocabulary + 5), (offset ^ 3, vocabulary))]
    for written, whole in (*frames, (logits, memory)):  # the last in place
        cuda_rows.write_gradient(written, logits, targets, lse, upstream, 0.5, None)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(written.double(), gradient, rtol=eps, atol=1e-6)
        assert untouched(whole, written)


@sweep(
    vocabulary=VOCABULARIES,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    softcap=[None, 4.0],
    offset=[0, 1, 4],
)
def test_slopes_are_written_over_the_logits_and_nowhere_else(vocabulary, dtype, softcap, offset):
    random = torch.Generator().manual_seed(offset)
    plain, bias = torch.randn(3, vocabulary, generator=random) * 3, torch.randn(vocabulary, generator=random)
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    scored = ScoredTokens(targets, None, targets, 1, 0.5, softcap, torch.float64, 64)
    head = torch.empty(vocabulary, 1, dtype=dtype)
    exact, v, slab = cpu_slab.softmax(plain.double(), targets, HeadInputs(head, head, bias.to(dtype).double()), scored)
    z, memory = framed(plain, offset, vocabulary + offset + vocabulary % 2)
    logps, ones, slope = cuda_slab.softmax(
        z, targets.to(DEVICE), HeadInputs(head, head, bias.to(dtype).to(DEVICE)), scored
    )
    assert ones.eq(1).all() and slope.dtype == dtype and slope.data_ptr() == z.data_ptr()
    torch.testing.assert_close(logps.double().cpu(), exact, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(slope.double().cpu(), slab * v[:, None], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert untouched(memory, z)
