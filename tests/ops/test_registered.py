"""log_ratio and pair_loss under torch.compile, activation checkpointing, autocast and deterministic algorithms."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from irlfast import ops
from irlfast.ops.common.types import HeadInputs, PairLossSpec, ScoredTokens
from irlfast.ops.pair_loss import checks, custom_op
from tests.helpers.ops_cases import gradients, make

FORMS = {
    "plain head": {},
    "everything": {"rows": True, "bias": True, "softcap": 30.0, "scale": 0.5, "ignored": True, "reference": "hidden"},
    "cached per token": {"reference": "token", "rows": True},
    "frozen, cached per sequence": {"reference": "sequence", "frozen": True},
    "frozen, rows": {"reference": "hidden", "frozen": True, "rows": True},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def both(case: dict) -> torch.Tensor:
    """A loss of all results of the two operations."""
    pairs = ops.pair_loss(**case, beta=0.1, nll_weight=0.2)
    tokens = ops.log_ratio(**case)
    return pairs.loss + pairs.log_ratio.sum() + tokens.log_ratio.square().sum() + tokens.token_logps.sum()


@forms
def test_compiles_as_one_graph_of_any_length(form):
    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([5, 3, 2, 7], [2, 4, 5, 3], [3, 1, 8, 3, 4, 6]):
        case = make(lengths, vocabulary=33, dtype=torch.float32, **form)
        with torch._dynamo.config.patch(error_on_recompile=True):
            expected, actual = both(case), compiled(case)
        assert torch.equal(actual, expected)
        exact = gradients(expected, case)
        for name, gradient in gradients(actual, case).items():
            assert torch.equal(gradient, exact[name]), name


def arguments(form: dict) -> tuple[HeadInputs, HeadInputs | None, ScoredTokens]:
    case = make([5, 3, 2, 7], vocabulary=33, dtype=torch.float32, **form)
    policy = HeadInputs(case["hidden"], case["weight"], case["bias"])
    reference = checks.check_reference(*(case.get(f"ref_{name}") for name in HeadInputs._fields), policy)
    options = (case[name] for name in ("targets", "cu_seqlens", "rows", "logit_scale", "logit_softcap"))
    scored = checks.check_scored(policy, *options, 1024)
    return policy, reference, checks.check_ref_logps(case.get("ref_logps"), reference is not None, scored)


@forms
def test_torch_accepts_the_registered_operations(form):
    policy, reference, scored = arguments(form)
    both = *policy, *(reference or custom_op.NO_REFERENCE)
    wanted = custom_op.needs_gradient(policy)
    keep = wanted == [True, False, False]
    torch.library.opcheck(custom_op.forward, (*both, *scored, "cpu", keep))
    detached = [None if tensor is None else tensor.detach() for tensor in both]
    upstream = torch.randn(len(scored.targets))
    torch.library.opcheck(custom_op.backward, (upstream, *detached, *scored, "cpu", wanted))
    pairs, weights = torch.tensor([[0, 1], [0, 3]]), torch.tensor([1.0, 0.5])
    spec = PairLossSpec(pairs, 0.1, ("hinge", "ipo"), (0.5, 2.0), weights, nll_weight=0.5, num_tokens=3.0)
    torch.library.opcheck(custom_op.pair_slabs, (*detached, *scored, *spec, "cpu", wanted))


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_autocast_changes_nothing_of_its_own_dtype_nor_of_fp64(form, dtype):
    case = make([5, 3, 2, 7], dtype=dtype, **form)
    expected = both(case)
    exact = gradients(expected, case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = both(case)
        assert torch.equal(actual, expected)
        for name, gradient in gradients(actual, case).items():
            assert torch.equal(gradient, exact[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
@forms
def test_activation_checkpointing_changes_no_bit(form, reentrant):
    case = make([5, 3, 2, 7], **form)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return both(case | {"hidden": hidden.tanh()})

    expected = loss(case["hidden"])
    exact = gradients(expected, case)
    actual = checkpoint(loss, case["hidden"], use_reentrant=reentrant)
    actual.backward()
    assert torch.equal(actual, expected)
    for name, gradient in exact.items():
        assert torch.equal(case[name].grad, gradient), name


@forms
def test_gradients_are_deterministic_on_request(form):
    case = make([5, 3, 2, 7], vocabulary=300, dtype=torch.bfloat16, **form)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(both(case), case) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, gradient in runs[0].items():
        assert all(torch.equal(run[name], gradient) for run in runs), name


def test_a_second_derivative_is_refused():
    case = make([2, 3])
    [gradient] = torch.autograd.grad(ops.pair_loss(**case, beta=0.1).loss, case["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
