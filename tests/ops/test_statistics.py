"""token_statistics, and log_ratio with token_statistics: entropy and log-sum-exp per token, and their gradients."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck

from irlfast import ops
from irlfast.ops.logits import statistics_op as logits_op
from irlfast.ops.pair_loss import cpu_slab
from irlfast.ops.pair_loss import statistics_op as hidden_op
from tests.helpers.ops_cases import Recorder, converted, gradients, make
from tests.helpers.statistics_cases import FACTORS, LENGTHS, LOGITS_FACTORS, check_hidden, check_logits
from tests.helpers.tiers import covering_cases, first_then_full, full, label, sweep

BACKENDS = ["plain", "cpu"]
EVERYTHING = {"rows": True, "bias": True, "scale": 0.5, "softcap": 2.0, "ignored": True, "reference": "hidden"}


@pytest.mark.parametrize("factors", covering_cases(LOGITS_FACTORS, beyond=full, drawn=200))
def test_statistics_of_logits_match_the_oracle_in_fp64(factors):
    check_logits(factors, "cpu", "cpu")


@pytest.mark.parametrize("factors", covering_cases(FACTORS, beyond=full, drawn=200))
def test_statistics_from_hidden_states_match_the_oracle_in_fp64(factors):
    check_hidden(factors, "cpu", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_those_of_torchs_distributions(backend):
    logits, targets = torch.randn(5, 9).double(), torch.tensor([0, 3, -100, 8, 2])
    result = ops.token_statistics(logits, targets, backend=backend)
    distribution = torch.distributions.Categorical(logits=logits)
    kept = targets >= 0
    torch.testing.assert_close(result.entropy, torch.where(kept, distribution.entropy(), 0))
    torch.testing.assert_close(result.token_logps, torch.where(kept, distribution.log_prob(targets.clamp(min=0)), 0))
    torch.testing.assert_close(result.lse, torch.where(kept, logits.exp().sum(1).log(), 0))


@sweep(softcap=[None, 2.0], scale=[1.0, -0.7], backend=BACKENDS)
def test_the_gradients_of_logits_are_the_derivatives(softcap, scale, backend):
    logits = torch.randn(4, 5).double().requires_grad_()
    targets = torch.tensor([1, -100, 4, 0])
    options = {"logit_scale": scale, "logit_softcap": softcap, "backend": backend}

    def statistics(leaf: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(ops.token_statistics(leaf, targets, **options))

    assert gradcheck(statistics, [logits])


@sweep(options=[{}, EVERYTHING, {"rows": True, "frozen": True}], buffer_mb=[1024, 1e-9], backend=BACKENDS)
def test_the_gradients_from_hidden_states_are_the_derivatives(options, buffer_mb, backend):
    case = make([2, 0, 3, 1], vocabulary=5, size=3, **options)
    names = [name for name in ("hidden", "weight", "bias") if getattr(case[name], "requires_grad", False)]

    def statistics(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments: dict[str, Any] = case | dict(zip(names, leaves, strict=True))
        result = ops.log_ratio(**arguments, backend=backend, buffer_mb=buffer_mb, token_statistics=True)
        return result.log_ratio, result.token_logps, result.token_entropy, result.token_lse

    assert gradcheck(statistics, [case[name] for name in names])


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"reference": "token"}, {"reference": "sequence"}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_other_results_are_those_without_statistics(backend, options):
    case = make(LENGTHS, **options)
    expected = ops.log_ratio(**case, backend=backend)
    actual = ops.log_ratio(**case, backend=backend, token_statistics=True)
    assert expected.token_entropy is None and expected.token_lse is None
    for name in ("log_ratio", "policy_logps", "ref_logps", "token_logps"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_policy_and_reference_have_ratio_exactly_0(dtype):
    case = make([100, 0, 37, 300], vocabulary=500, dtype=dtype, bias=True, softcap=30.0)
    ref = {"ref_hidden": case["hidden"], "ref_weight": case["weight"], "ref_bias": case["bias"]}
    assert not ops.log_ratio(**case, **ref, buffer_mb=0.1, token_statistics=True).log_ratio.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sharp_row_has_entropy_0_and_a_flat_one_log_v(backend):
    logits = torch.zeros(3, 1000)
    logits[0, 7], logits[1, 7] = 1e4, 100.0
    logits.requires_grad_()
    result = ops.token_statistics(logits, torch.tensor([7, 7, 7]), backend=backend)
    assert result.entropy[0] == 0 and 0 <= result.entropy[1] < 1e-30
    torch.testing.assert_close(result.entropy[2], torch.tensor(1000.0).log())
    [gradient] = torch.autograd.grad(result.entropy.sum(), logits)
    assert gradient.abs().max() < 1e-6  # both are extremes of the entropy


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_one_row_stays_there(backend):
    case = make([3, 2], dtype=torch.float32, vocabulary=40)
    case["hidden"] = case["hidden"].detach().index_fill(0, torch.tensor([3]), float("nan")).requires_grad_()
    result = ops.log_ratio(**case, backend=backend, token_statistics=True)
    assert result.token_entropy.isnan().tolist() == [False, False, False, True, False]
    gradient = gradients(result.token_entropy.sum(), case)["hidden"]
    assert gradient.isnan().any(1).tolist() == [False, False, False, True, False]


def test_a_row_that_nobody_uses_has_no_gradient_whatever_it_holds():
    logits = torch.randn(3, 7)
    logits[1] = float("nan")
    logits.requires_grad_()
    result = ops.token_statistics(logits, torch.tensor([1, 2, 3]), backend="cpu")
    for value in result:
        [gradient] = torch.autograd.grad(value[[0, 2]].sum(), logits, retain_graph=True)
        assert gradient.isfinite().all() and not gradient[1].any()


@pytest.mark.parametrize("lengths", [[], [0, 0], [1]], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_sizes_work(backend, vocabulary, lengths):
    case = make(lengths, vocabulary=vocabulary, bias=True)
    result = ops.log_ratio(**case, backend=backend, token_statistics=True)
    assert result.token_entropy.shape == result.token_lse.shape == (sum(lengths),)
    assert vocabulary > 1 or not result.token_entropy.any()
    gradient = gradients(result.token_entropy.sum() + result.token_lse.sum(), case)
    assert all(value.isfinite().all() for value in gradient.values())


@pytest.mark.parametrize(("grad", "frozen", "passes"), [(False, False, 1), (True, True, 3), (True, False, 4)])
def test_the_head_is_passed_over_as_often_as_documented(grad, frozen, passes, monkeypatch):
    monkeypatch.setattr(cpu_slab, "kernels", lambda operands: cpu_slab.EXACT)  # the recorder counts PyTorch's products
    case = make([40, 0, 24], vocabulary=300, dtype=torch.float32, frozen=frozen)
    with Recorder() as recorder, torch.set_grad_enabled(grad):
        result = ops.log_ratio(**case, backend="cpu", buffer_mb=0.01, token_statistics=True)
        if grad:
            (result.log_ratio.sum() + result.token_entropy.sum()).backward()
    assert recorder.operations == passes * 2 * 64 * 300 * 8


def test_no_tensor_of_all_tokens_by_vocabulary_is_ever_made():
    case = make([100] * 16, vocabulary=8000, dtype=torch.bfloat16, softcap=30.0, reference="hidden")
    with Recorder() as recorder:
        result = ops.log_ratio(**case, buffer_mb=70 * 8000 * 4 / 2**20, token_statistics=True)
        (result.log_ratio.sum() + result.token_lse.square().sum()).backward()
    assert recorder.largest <= 8000 * 70


# ---------------------------------------------------------------- compiled


@full
def test_compiles_as_one_graph_of_any_length():
    def loss(logits: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
        one, other = ops.token_statistics(logits, case["targets"]), ops.log_ratio(**case, token_statistics=True)
        return one.entropy.sum() + one.lse.sum() + other.token_entropy.square().sum() + other.log_ratio.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([5, 3, 2, 7], [2, 4, 5, 3], [3, 1, 8, 3, 4, 6]):
        case = make(lengths, vocabulary=33, dtype=torch.float32, **EVERYTHING)
        logits = torch.randn(sum(lengths), 35)
        with torch._dynamo.config.patch(error_on_recompile=True):
            expected, actual = loss(logits, case), compiled(logits, case)
        assert torch.equal(actual, expected)
        exact = gradients(expected, case)
        for name, gradient in gradients(actual, case).items():
            assert torch.equal(gradient, exact[name]), name


@pytest.mark.parametrize("module", first_then_full([hidden_op, logits_op]), ids=label)
def test_torch_accepts_the_registered_operations(module):
    case = converted(make([5, 3, 2, 7], vocabulary=33, **EVERYTHING), torch.float32)
    logits, targets = torch.randn(17, 33, requires_grad=True), case["targets"]
    calls, forward = [], module.forward
    with mock.patch.object(module, "forward", lambda *args: calls.append(args) or forward(*args)):
        if module is hidden_op:
            ops.log_ratio(**case, token_statistics=True)
        else:
            ops.token_statistics(logits, targets)
    [arguments] = calls
    torch.library.opcheck(forward, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    rows = [torch.randn(17) for _ in range(5)]
    if module is hidden_op:
        torch.library.opcheck(module.backward, (*rows, *detached, [True, True, True]))
    else:
        write = (torch.empty_like(detached[0]), *detached[:2], *rows[:4], 0.5, 2.0, "cpu")
        torch.library.opcheck(module.write_gradient, write)


def test_the_cuda_backend_is_refused():
    with pytest.raises(ValueError, match="backend: found 'cuda', expected 'auto', 'plain', 'cpu' or 'triton'"):
        ops.log_ratio(**make([2, 3]), backend="cuda", token_statistics=True)
    with pytest.raises(ValueError, match="backend: found 'cuda', expected 'auto', 'plain', 'cpu' or 'triton'"):
        ops.token_statistics(torch.zeros(2, 3), torch.tensor([0, 1]), backend="cuda")
