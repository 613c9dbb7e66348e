"""FusedRMSprop by the CUDA module: PyTorch's RMSprop to fp32 rounding, and the CPU module's bits."""

from typing import Any

import pytest
import torch

from irlfast import native
from irlfast.optim import FusedRMSprop, module_for
from tests.helpers.tiers import sweep
from tests.kernels.device import DEVICE
from tests.ops.test_optim import FORMS, SHAPES, parameters, set_gradients

needs_cpu_module = pytest.mark.skipif(native.cpu is None, reason="irlfast._cpu is not built here")


@pytest.fixture(autouse=True)
def taken():
    if native.cuda is None or module_for(torch.device(DEVICE)) is not native.cuda:
        pytest.skip("irlfast._cuda is not built here")


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_hundred_steps_match_pytorchs(options):
    ours = [p.detach().to(DEVICE).requires_grad_() for p in parameters(SHAPES)]
    theirs, exact = parameters(SHAPES), [p.detach().double().requires_grad_() for p in parameters(SHAPES)]
    optimisers = [
        FusedRMSprop(ours, lr=1e-2, **options),
        torch.optim.RMSprop(theirs, lr=1e-2, foreach=True, **options),
        torch.optim.RMSprop(exact, lr=1e-2, foreach=True, **options),
    ]
    for step in range(100):
        set_gradients([theirs, exact], step)
        for own, peer in zip(ours, theirs, strict=True):
            own.grad = peer.grad.to(DEVICE)
        for optimiser in optimisers:
            optimiser.step()
    for own, peer, true in zip(ours, theirs, exact, strict=True):
        if own.numel():
            # PyTorch's own error against fp64 is the measure, and four units in the last place of what was added up.
            assert (own.cpu() - true).abs().max() <= 2 * (peer - true).abs().max() + 4e-6


def trained(shapes: list[tuple], dtype: torch.dtype, offset: int, device: str, **options: Any) -> list[torch.Tensor]:
    """Parameters and their states after 3 steps, ``offset`` elements from a 16-byte boundary."""
    ours = []
    for parameter in parameters(shapes):
        storage = torch.empty(parameter.numel() + offset, dtype=dtype, device=device)
        ours.append(storage[offset:].copy_(parameter.detach()).requires_grad_())
    optimiser = FusedRMSprop(ours, lr=1e-2, **options)
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        for own in ours:
            own.grad = torch.randn(own.shape, generator=random).to(device, dtype)
        optimiser.step()
    return [tensor.cpu() for own in ours for tensor in (own.detach(), *optimiser.state[own].values())]


def check_bits(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> None:
    actual = trained(*arguments, DEVICE, **options)
    monkeypatch.setattr(native, "cuda", None)
    expected = trained(*arguments, "cpu", **options)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@needs_cpu_module
@sweep(offset=[0, 1, 2, 4], dtype=[torch.float32, torch.bfloat16], options=FORMS)
def test_bits_are_those_of_the_cpu_wherever_a_parameter_lies(options, dtype, offset, monkeypatch):
    check_bits(monkeypatch, [(1,), (3,), (4,), (8192,), (20001,)], dtype, offset, **options)


@needs_cpu_module
@pytest.mark.parametrize("count", [400, 401, 850])
def test_more_parameters_than_one_launch_takes_are_updated(count, monkeypatch):
    check_bits(monkeypatch, [(k % 7,) for k in range(1, count + count // 6)], torch.float32, 0)
