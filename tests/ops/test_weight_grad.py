"""pair_loss with ``weight_grad``: the gradient added there is the one that autograd gives ``weight`` without it."""

import pytest
import torch

from irlfast import ops
from irlfast.ops.common.types import PairLossSpec
from irlfast.ops.pair_loss import cpu_slab, custom_op
from tests.helpers.ops_cases import Recorder, gradients, make
from tests.ops.test_registered import FORMS, arguments, forms

LENGTHS = [5, 3, 2, 7]
LOSS = {"beta": 0.3, "nll_weight": 0.2}
backends = pytest.mark.parametrize("backend", ["plain", "cpu"])


@forms
@backends
@pytest.mark.parametrize("buffer_mb", [1024, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_micro_batches_add_up_to_autograds_gradients(form, backend, buffer_mb, dtype):
    options = LOSS | {"backend": backend, "buffer_mb": buffer_mb}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = [make(LENGTHS, dtype=dtype, seed=seed, **form | {"frozen": False}) for seed in range(2)]
    total, actual = torch.zeros(2, 7, 8, dtype=wide)
    for case in cases:
        exact = gradients(ops.pair_loss(**case, **options).loss, case)
        frozen = form.get("frozen", False)  # whether the weight wants a gradient does not matter
        given = case | {"weight": case["weight"].detach().requires_grad_(not frozen)}
        result = ops.pair_loss(**given, **options, weight_grad=actual)
        result.loss.backward()
        total += exact.pop("weight")
        assert torch.equal(result.loss, ops.pair_loss(**case, **options).loss)
        assert given["weight"].grad is None
        assert all(torch.equal(case[name].grad, gradient) for name, gradient in exact.items())
    rounding = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(actual, total, rtol=rounding, atol=rounding * total.abs().max().item())


@backends
def test_a_factor_on_the_loss_reaches_hidden_and_bias_only(backend):
    case, actual = make(LENGTHS, bias=True), torch.zeros(7, 8).double()
    exact = gradients(ops.pair_loss(**case, **LOSS, backend=backend).loss, case)
    loss = ops.pair_loss(**case, **LOSS, backend=backend, weight_grad=actual).loss
    for _ in range(2):
        hidden, bias = torch.autograd.grad(3 * loss, (case["hidden"], case["bias"]), retain_graph=True)
        torch.testing.assert_close(hidden, 3 * exact["hidden"])
        torch.testing.assert_close(bias, 3 * exact["bias"])
    torch.testing.assert_close(actual, exact["weight"])


@backends
def test_without_gradients_weight_grad_stays_unchanged(backend):
    actual = torch.ones(7, 8).double()
    with torch.no_grad():
        ops.pair_loss(**make(LENGTHS), **LOSS, backend=backend, weight_grad=actual)
    assert torch.equal(actual, torch.ones_like(actual))


@backends
@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 0], [1, 1]])
def test_degenerate_sizes_work(backend, lengths):
    case, actual = make(lengths), torch.zeros(7, 8).double()
    exact = gradients(ops.pair_loss(**case, **LOSS, backend=backend).loss, case)["weight"]
    ops.pair_loss(**case, **LOSS, backend=backend, weight_grad=actual)
    torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_tensor_of_the_weights_size_is_made(dtype):
    vocabulary, size = 2 * cpu_slab.TILE, 64
    case = make([20, 30], vocabulary=vocabulary, size=size, dtype=dtype)
    weight_grad = torch.zeros(vocabulary, size)
    buffer_mb = 8 * vocabulary * 4 / 2**20
    largest = []
    for given in ({}, {"weight_grad": weight_grad}):
        with Recorder(case["weight"], weight_grad) as recorder:
            ops.pair_loss(**case, **LOSS, backend="cpu", buffer_mb=buffer_mb, **given).loss.backward()
        largest.append(recorder.largest)
    assert largest[1] < vocabulary * size <= largest[0]


# ---------------------------------------------------------------- registration and compilation


@forms
def test_torch_accepts_the_registered_operations(form):
    policy, reference, scored = arguments(form)
    detached = [None if x is None else x.detach() for x in (*policy, *(reference or custom_op.NO_REFERENCE))]
    spec = PairLossSpec(torch.tensor([[0, 1], [0, 3]]), 0.1, "hinge", 0.5, None, 3.0)
    wanted = [True, False, policy.bias is not None]
    given = torch.zeros_like(policy.weight), *detached, *scored, *spec, "cpu", wanted
    torch.library.opcheck(custom_op.pair_slabs, given)


@pytest.mark.parametrize("form", [FORMS["plain head"], FORMS["everything"]], ids=["plain head", "everything"])
def test_compiles_as_one_graph_of_any_length(form):
    def loss(case: dict, weight_grad: torch.Tensor) -> torch.Tensor:
        return 2 * ops.pair_loss(**case, **LOSS, weight_grad=weight_grad).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in (LENGTHS, [2, 4, 5, 3], [3, 1, 8, 3, 4, 6]):
        case = make(lengths, vocabulary=33, dtype=torch.float32, **form)
        exact, actual = torch.ones(33, 8), torch.ones(33, 8)
        with torch._dynamo.config.patch(error_on_recompile=True):
            expected, result = loss(case, exact), compiled(case, actual)
        assert torch.equal(result, expected)
        assert torch.equal(actual, exact)
        assert torch.equal(*(torch.autograd.grad(x, case["hidden"])[0] for x in (result, expected)))


# ---------------------------------------------------------------- errors

ERRORS = {
    "a list": ([0.0], r"weight_grad: found list, expected \[V, H\] float32"),
    "of bf16": (
        torch.zeros(7, 8).bfloat16(),
        r"weight_grad: found \[7, 8\] bfloat16 on cpu, expected \[V, H\] float32",
    ),
    "of another shape": (torch.zeros(8, 7), r"weight_grad: found \[8, 7\] .*expected \[7, 8\], as weight has, contig"),
    "not contiguous": (torch.zeros(8, 7).T, r"weight_grad: found \[7, 8\] .*contiguous"),
    "with a gradient": (torch.zeros(7, 8, requires_grad=True), "weight_grad: .*without a gradient"),
}


@pytest.mark.parametrize(("weight_grad", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_names_what_was_found_and_expected(weight_grad, message):
    with pytest.raises(ValueError, match=message):
        ops.pair_loss(**make(LENGTHS, dtype=torch.bfloat16), beta=0.1, weight_grad=weight_grad)


def test_skip_mass_with_weight_grad_is_refused():
    with pytest.raises(ValueError, match=r"skip_mass: found 0\.1, expected 0 where weight_grad is given"):
        ops.pair_loss(**make(LENGTHS), beta=0.1, skip_mass=0.1, weight_grad=torch.zeros(7, 8).double())
