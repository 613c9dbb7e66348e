"""FusedRMSprop: PyTorch's RMSprop to fp32 rounding, natively and without the native module."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast import native
from irlfast.optim import FusedRMSprop, module_for

SHAPES = [(7,), (300, 17), (), (0,), (1,), (65537,), (3, 5, 2)]
FORMS = [
    {},
    {"weight_decay": 0.1, "momentum": 0.9},
    {"centered": True, "maximize": True},
    {"centered": True, "momentum": 0.5, "weight_decay": 0.01, "alpha": 0.9, "eps": 1e-4},
]
modules = pytest.mark.parametrize("module", ["native", "torch"])


@pytest.fixture(autouse=True)
def chosen(request, monkeypatch):
    """The native module that a test asks for, or none."""
    kind = request.node.callspec.params.get("module", "native") if hasattr(request.node, "callspec") else "native"
    if kind == "torch":
        monkeypatch.setattr(native, "cpu", None)
    elif native.cpu is None:
        pytest.skip("irlfast._cpu is not built here")


def parameters(shapes: list[tuple], seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]


def set_gradients(lists: list[list[torch.Tensor]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for together in zip(*lists, strict=True):
        gradient = torch.randn(together[0].shape, generator=random)
        for parameter in together:
            parameter.grad = gradient.clone().to(parameter.dtype)


@modules
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_hundred_steps_match_pytorchs(options, module):
    ours, theirs, exact = parameters(SHAPES), parameters(SHAPES), [p.detach().double() for p in parameters(SHAPES)]
    exact = [p.requires_grad_() for p in exact]
    kinds = (FusedRMSprop(ours, lr=1e-2, **options), torch.optim.RMSprop(theirs, lr=1e-2, **options))
    optimisers = (*kinds, torch.optim.RMSprop(exact, lr=1e-2, **options))
    for step in range(100):
        set_gradients([ours, theirs, exact], step)
        for optimiser in optimisers:
            optimiser.step()
    for own, peer, true in zip(ours, theirs, exact, strict=True):
        if own.numel():
            # PyTorch's own error against fp64 is the measure, and four units in the last place of what was added up.
            allowed = 2 * (peer - true).abs().max() + 4e-6
            assert (own - true).abs().max() <= allowed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4),
    momentum=st.sampled_from([0.0, 0.9]),
    centered=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    lr=st.sampled_from([0.0, 1e-3, 0.1]),
    threads=st.integers(1, 3),
)
def test_any_shapes_and_options_match_pytorch(shapes, lr, threads, **options):
    ours, theirs = parameters(shapes), parameters(shapes)
    optimisers = FusedRMSprop(ours, lr=lr, **options), torch.optim.RMSprop(theirs, lr=lr, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(3):
            set_gradients([ours, theirs], step)
            for optimiser in optimisers:
                optimiser.step()
    finally:
        torch.set_num_threads(before)
    for own, peer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, peer, rtol=1e-5, atol=1e-5)


@modules
def test_bf16_parameters_follow_their_fp32_masters(module):
    ours = [p.detach().bfloat16().requires_grad_() for p in parameters(SHAPES)]
    theirs = [p.detach().float().requires_grad_() for p in ours]
    optimisers = FusedRMSprop(ours, lr=1e-4), torch.optim.RMSprop(theirs, lr=1e-4)
    for step in range(20):
        set_gradients([ours], step)
        for own, peer in zip(ours, theirs, strict=True):
            peer.grad = own.grad.float()
        for optimiser in optimisers:
            optimiser.step()
    for own, peer in zip(ours, theirs, strict=True):
        master = optimisers[0].state[own]["master"]
        torch.testing.assert_close(master, peer.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(own, master.bfloat16())


def test_bits_do_not_depend_on_threads_nor_on_where_a_parameter_lies():
    count = 1 << 18
    whole = torch.randn(count + 3, generator=torch.Generator().manual_seed(0))
    results = []
    for threads, offset in ((1, 0), (2, 0), (3, 0), (1, 3)):
        torch.set_num_threads(threads)
        storage = torch.empty(count + 3)
        own = storage[offset : offset + count].copy_(whole[:count]).requires_grad_()
        optimiser = FusedRMSprop([own], lr=1e-3, momentum=0.9)
        for _ in range(3):
            own.grad = whole[3:].clone()
            optimiser.step()
        results.append(own.detach().clone())
    torch.set_num_threads(2)
    assert all(torch.equal(result, results[0]) for result in results)


@modules
def test_a_saved_state_continues_with_the_same_bits(module):
    ours = parameters(SHAPES)
    optimiser = FusedRMSprop(ours, lr=1e-2, momentum=0.9, centered=True)
    set_gradients([ours], 0)
    optimiser.step()
    twins = [p.detach().clone().requires_grad_() for p in ours]
    other = FusedRMSprop(twins, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for step in range(1, 4):
        set_gradients([ours, twins], step)
        optimiser.step()
        other.step()
    assert all(torch.equal(own, twin) for own, twin in zip(ours, twins, strict=True))


@modules
def test_exp_avg_is_in_the_saved_state_alone_where_there_is_no_momentum(module):
    """DeepSpeed's universal checkpoints need the state; in memory, zeros would be a waste."""
    [ours] = parameters([(300, 17)])
    optimiser = FusedRMSprop([ours])
    set_gradients([[ours]], 0)
    optimiser.step()
    saved = optimiser.state_dict()
    average = saved["state"][0]["exp_avg"]
    assert average.shape == ours.shape and not average.any() and average.untyped_storage().nbytes() == 4
    assert "exp_avg" not in optimiser.state[ours]
    optimiser.load_state_dict(saved)
    assert "exp_avg" not in optimiser.state[ours]
    optimiser.state[ours]["exp_avg"] = torch.zeros(300, 17)  # as DeepSpeed loads it
    optimiser.step()
    assert "exp_avg" not in optimiser.state[ours]


@modules
def test_a_state_of_pytorchs_rmsprop_can_be_loaded(module):
    theirs = parameters(SHAPES)
    before = torch.optim.RMSprop(theirs, lr=1e-2, momentum=0.9, centered=True)
    set_gradients([theirs], 0)
    before.step()
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    after = FusedRMSprop(ours, lr=1.0)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    set_gradients([ours, theirs], 1)
    before.step()
    after.step()
    for own, peer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, peer, rtol=1e-5, atol=1e-6)


@modules
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_module_may_be_cast_between_steps(dtypes, module):
    first, second = dtypes
    layer = torch.nn.Linear(64, 1, bias=False).to(first)
    optimiser = FusedRMSprop(layer.parameters(), lr=1e-2)
    for dtype in (first, second):
        layer.to(dtype)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimiser.step()
    exact = layer.weight.detach().double().clone()
    state = optimiser.state[layer.weight]
    assert ("master" in state) == (second == torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for name, tensor in state.items() if name != "step")
    assert state["exp_avg_sq"].allclose(torch.tensor(0.0199)) and exact.isfinite().all()


def test_a_state_of_another_shape_is_refused():
    one, other = FusedRMSprop(parameters([(3,)])), FusedRMSprop(parameters([(4,)]))
    for optimiser in (one, other):
        set_gradients([optimiser.param_groups[0]["params"]], 0)
    one.step()
    other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"found state exp_avg_sq of shape \[3\], expected \[4\]"):
        other.step()


@modules
def test_tensors_that_are_not_contiguous_and_parameters_without_gradient_match_pytorch(module):
    ours, theirs = (torch.arange(12.0).view(3, 4).T.clone(memory_format=torch.preserve_format) for _ in "ab")
    idle = torch.ones(2, requires_grad=True)
    pair = [ours.requires_grad_(), theirs.requires_grad_()]
    for parameter in pair:
        parameter.grad = torch.ones_like(parameter)
    FusedRMSprop([ours, idle], lr=0.1).step()
    torch.optim.RMSprop([theirs, idle], lr=0.1).step()
    assert not ours.is_contiguous() and torch.allclose(ours, theirs) and idle.eq(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: found -1.0, expected a number >= 0"),
        ({"alpha": 1.0}, "alpha: found 1.0, expected a number < 1"),
        ({"eps": float("nan")}, "eps: found nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FusedRMSprop(parameters([(2,)]), **options)


def test_the_binding_checks_what_it_is_given():
    own = torch.zeros(4)
    for row, message in (
        ((4, 0, 0, 0, 0, 0, 0, False), "param: found a null pointer"),
        ((4, own.data_ptr() + 1, 0, 0, 0, 0, 0, False), "param: found an address that is not aligned"),
        ((-1, own.data_ptr(), 0, 0, 0, 0, 0, False), "n: found -1, expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            native.cpu.rmsprop([row], 0.1, 0.9, 1e-8, 0.0, 0.0, 1.0, 1)


def test_a_gpu_module_that_cannot_run_is_not_used(monkeypatch):
    class Module:
        device = "cpu"

        def rmsprop(self, *given):
            raise RuntimeError("rmsprop_kernel: no kernel image is available for execution on the device")

    monkeypatch.setattr(native, "cuda", Module())
    with pytest.warns(UserWarning, match="does not run on cpu .*no kernel image.*PyTorch's RMSprop does"):
        assert module_for(torch.device("cpu")) is native.cpu
