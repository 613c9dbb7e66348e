"""pair_loss: the cpu backend against the oracle in fp64, the oracle against loops, documented properties, errors."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from irlfast import native, ops
from irlfast.ops.pair_loss import cpu_slab
from irlfast.ops.pair_loss.losses import PAIR_LOSSES
from irlfast.ops.pair_loss.slab import SlabKernels
from tests.helpers.ops_cases import Recorder, converted, gradients, looped_pair_loss, make, random_pairs
from tests.helpers.pair_loss_oracles import options_of, without_unused_reference
from tests.helpers.tiers import covering_cases

BACKENDS = ["plain", "cpu"]
LOSSES = list(PAIR_LOSSES)
LENGTHS = [5, 3, 0, 7, 1, 0, 4, 6]
EVERYTHING = {"rows": True, "bias": True, "scale": 0.5, "softcap": 2.0, "ignored": True, "reference": "hidden"}

# Every factor that the backends must agree on.
FACTORS = {
    "dtype": [torch.float32, torch.bfloat16],
    "vocabulary": [1, 7, 1000, 32000],
    "size": [8, 64],
    "rows": [False, True],
    "bias": [False, True],
    "scale": [1.0, 0.25],
    "softcap": [None, 30.0, 2.0],
    "ignored": [False, True],
    "reference": ["none", "hidden", "token", "sequence"],
    "frozen": [False, True],
    "loss_type": ["sigmoid", "hinge", "nca_pair", "ipo"],  # of each kind one; test_mixtures.py draws all
    "nll_weight": [0.0, 0.3],
    "coupling": ["default", "random"],
    "rows_in_buffer": [1, 9, 10**6],  # a token at a time, groups larger than the buffer, all in one slab
}
LOSS_FACTORS = ("loss_type", "nll_weight", "coupling", "rows_in_buffer")


def check_against_fp64_oracle(factors: dict, kernels: SlabKernels) -> None:
    case = make(LENGTHS, **{name: value for name, value in factors.items() if name not in LOSS_FACTORS})
    pairs = None if factors["coupling"] == "default" else random_pairs(len(LENGTHS), seed=0)
    loss = {"pairs": pairs, "beta": 0.3, "loss_type": factors["loss_type"], "nll_weight": factors["nll_weight"]}
    double = converted(case, torch.float64)
    expected = ops.pair_loss(**double, **loss, backend="plain")
    buffer_mb = factors["rows_in_buffer"] * factors["vocabulary"] * 4 / 2**20
    with mock.patch.object(cpu_slab, "kernels", lambda operands: kernels):
        result = ops.pair_loss(**case, **loss, backend="cpu", buffer_mb=buffer_mb)
    for name in ("loss", "log_ratio", "policy_logps", "ref_logps", "nll_loss"):
        torch.testing.assert_close(getattr(result, name).double(), getattr(expected, name), rtol=1e-5, atol=3e-5)
    exact = gradients(expected.loss, double)
    for name, gradient in gradients(result.loss, case).items():
        assert gradient.dtype == case[name].dtype
        # Rounded once to the tensor's dtype, after fp32 sums over 32,000 terms (plain PyTorch in fp32 errs by 3e-5).
        half_ulp = torch.finfo(case[name].dtype).eps / 2
        bound = exact[name].abs() * half_ulp * 1.01 + exact[name].abs().max() * 5e-5 + 1e-9
        if kernels in (cpu_slab.NARROW, cpu_slab.NATIVE[torch.bfloat16]):
            # Up to two factors of every term were rounded too. Terms are larger than their sum.
            bound += exact[name].abs().max() * half_ulp * 2
        assert ((gradient.double() - exact[name]).abs() <= bound).all(), name


@pytest.mark.parametrize("factors", covering_cases(FACTORS, beyond=(), drawn=500))
def test_cpu_matches_the_oracle_in_fp64(factors):
    check_against_fp64_oracle(factors, cpu_slab.EXACT)
    if factors["dtype"] == torch.bfloat16:
        check_against_fp64_oracle(factors, cpu_slab.NARROW)
    if hasattr(native.cpu, "multiply"):
        check_against_fp64_oracle(factors, cpu_slab.NATIVE[factors["dtype"]])


EQUAL = {
    "dtype": [torch.float32, torch.bfloat16],
    "vocabulary": [7, 1000, 5003],
    "size": [8, 64],
    "softcap": [None, 5.0],
    "ignored": [False, True],
    "frozen": [False, True],
    "per": ["token", "sequence"],
    "weights": [False, True],
    "backend": BACKENDS,
    "rows_in_buffer": [1, 300, 10**6],
}


@pytest.mark.parametrize("factors", covering_cases(EQUAL, beyond=(), drawn=100))
def test_a_reference_that_the_operation_scored_with_the_policys_weights_leaves_log_ratios_of_exactly_zero(factors):
    names = ("dtype", "vocabulary", "size", "softcap", "ignored", "frozen")
    lengths = [40, 3, 0, 97, 1, 0, 4, 260]
    case = make(lengths, **{name: factors[name] for name in names}, reference="none")
    buffer_mb = factors["rows_in_buffer"] * factors["vocabulary"] * 4 / 2**20
    backend = {"backend": factors["backend"], "buffer_mb": buffer_mb}
    if factors["weights"]:
        case["token_weights"] = torch.rand(sum(lengths))
    with torch.no_grad():
        scored = ops.log_ratio(**case, **backend)
    reference = scored.token_logps if factors["per"] == "token" else scored.policy_logps
    options = {"ref_logps": reference, **backend}
    assert scored.policy_logps.abs().max() > 100
    for result in (ops.pair_loss(**case, **options, beta=0.1), ops.log_ratio(**case, **options)):
        assert result.log_ratio.eq(0).all()


@st.composite
def problems(draw):
    lengths = draw(st.lists(st.integers(0, 4), max_size=5))
    options = {
        name: draw(st.sampled_from(FACTORS[name])) for name in ("rows", "bias", "ignored", "frozen", "reference")
    }
    case = make(lengths, vocabulary=draw(st.integers(1, 5)), size=3, seed=draw(st.integers(0, 99)), **options)
    loss_type = draw(st.sampled_from(LOSSES))
    case = without_unused_reference(case, loss_type)
    sequence = st.integers(0, max(0, len(lengths) - 1))
    pairs = draw(st.lists(st.tuples(sequence, sequence), max_size=5 if lengths else 0))
    loss = {
        "beta": draw(st.sampled_from([0.1, 1.0])),
        **options_of(loss_type),
        "nll_weight": draw(st.sampled_from([0.0, 0.5])),
    }
    return case, torch.tensor(pairs, dtype=torch.long).view(-1, 2), loss, draw(st.sampled_from([1024, 1e-4, 1e-9]))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_both_backends_match_loops_over_tokens_and_pairs(scored):
    case, pairs, loss, buffer_mb = scored
    expected, _, ratio = looped_pair_loss(case, pairs, **loss)
    # A loss that does not reach a leaf (no pairs, no tokens) has gradient zero there.
    anchor = expected + sum(0 * leaf.sum() for leaf in case.values() if getattr(leaf, "requires_grad", False))
    exact = gradients(anchor, case)
    for backend in BACKENDS:
        result = ops.pair_loss(**case, pairs=pairs, **loss, backend=backend, buffer_mb=buffer_mb)
        torch.testing.assert_close(result.loss.detach(), expected.detach())
        torch.testing.assert_close(result.log_ratio, ratio.detach())
        for name, gradient in gradients(result.loss, case).items():
            torch.testing.assert_close(gradient, exact[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"frozen": True, "reference": "token"}], ids=str)
@pytest.mark.parametrize("buffer_mb", [1024, 1e-9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_the_derivative_of_the_loss(backend, buffer_mb, options, loss_type):
    case = without_unused_reference(make([2, 0, 1, 3], vocabulary=5, size=3, **options), loss_type)
    names = [name for name in ("hidden", "weight", "bias") if getattr(case[name], "requires_grad", False)]
    loss = {"beta": 0.5, "nll_weight": 0.3, "backend": backend, "buffer_mb": buffer_mb} | options_of(loss_type)

    def of_leaves(*leaves):
        return ops.pair_loss(**case | dict(zip(names, leaves, strict=True)), **loss).loss

    assert gradcheck(of_leaves, [case[name] for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_loss_carries_a_gradient(backend):
    result = ops.pair_loss(**make([2, 3]), beta=0.1, backend=backend)
    assert [x.requires_grad for x in result] == [True, False, False, False, False, False]
    with torch.no_grad():
        assert not ops.pair_loss(**make([2, 3]), beta=0.1, backend=backend).loss.requires_grad


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_sequences_give_permuted_results(backend, loss_type):
    case = without_unused_reference(make(LENGTHS, rows=True, reference="token", ignored=True), loss_type)
    pairs = random_pairs(len(LENGTHS), seed=3)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0))
    parts = [torch.arange(sum(LENGTHS)).split(LENGTHS)[s] for s in order]
    tokens = torch.cat(parts)
    permuted = case | {name: case[name][tokens] for name in ("targets", "rows", "ref_logps") if name in case}
    permuted["cu_seqlens"] = torch.tensor([0, *map(len, parts)]).cumsum(0).int()
    moved = order.argsort()[pairs]
    loss = {"beta": 0.4, "nll_weight": 0.2, "backend": backend} | options_of(loss_type)
    one, other = ops.pair_loss(**case, pairs=pairs, **loss), ops.pair_loss(**permuted, pairs=moved, **loss)
    assert torch.allclose(one.loss, other.loss)
    assert torch.allclose(one.log_ratio[order], other.log_ratio)
    expected = gradients(one.loss, case)
    for name, gradient in gradients(other.loss, permuted).items():
        assert torch.allclose(gradient, expected[name])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_scales_with_the_upstream_gradient_and_can_be_taken_twice(backend, frozen):
    case = make([2, 3], frozen=frozen, bias=True)
    loss = ops.pair_loss(**case, beta=0.4, backend=backend).loss
    leaves = [case["hidden"]] if frozen else [case["hidden"], case["weight"], case["bias"]]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, leaves)
    for a, b in zip(once, thrice, strict=True):
        assert torch.allclose(3 * a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_overwriting_a_gradient_does_not_change_later_ones(backend):
    case = make([2, 3])
    loss = ops.pair_loss(**case, beta=0.4, backend=backend).loss
    loss.backward(retain_graph=True)
    first = [case[name].grad.clone() for name in ("hidden", "weight")]
    for name in ("hidden", "weight"):
        case[name].grad.fill_(7)
        case[name].grad = None
    loss.backward()
    assert all(torch.equal(case[name].grad, old) for name, old in zip(("hidden", "weight"), first, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalised_over_a_global_batch_the_parts_add_up_to_the_whole(backend):
    case = make([2, 3, 4, 1], ignored=True)
    loss = {"beta": 0.4, "nll_weight": 0.5, "backend": backend}
    tokens = int((case["targets"] >= 0)[[0, 1, 5, 6, 7, 8]].sum())
    whole = ops.pair_loss(**case, **loss)
    parts = [
        ops.pair_loss(**case, **loss, pairs=torch.tensor([pair]), num_pairs=2, num_tokens=tokens)
        for pair in ([0, 1], [2, 3])
    ]
    assert torch.allclose(whole.loss, parts[0].loss + parts[1].loss)
    assert torch.allclose(whole.nll_loss, parts[0].nll_loss + parts[1].nll_loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_with_several_synthetic_answers_is_one_expert_in_the_nll(backend):
    case = make([2, 3, 4])
    result = ops.pair_loss(**case, pairs=torch.tensor([[0, 1], [0, 2]]), beta=0.1, backend=backend)
    assert torch.allclose(result.nll_loss, -result.policy_logps[0] / 2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("buffer_mb", [1024, 1e-9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_pair_stays_there(backend, buffer_mb, frozen):
    case = make([3, 2, 4, 1], dtype=torch.float32, frozen=frozen, reference="token")
    loss = {"beta": 0.1, "backend": backend, "buffer_mb": buffer_mb}
    clean = ops.pair_loss(**case, **loss)
    case["hidden"] = case["hidden"].detach().index_fill(0, torch.tensor([3]), float("nan")).requires_grad_()
    result = ops.pair_loss(**case, **loss)
    others = torch.tensor([0, 2, 3])
    for name in ("log_ratio", "policy_logps", "ref_logps"):
        assert torch.equal(getattr(result, name)[others], getattr(clean, name)[others])
    assert result.log_ratio[1].isnan()
    assert torch.equal(result.nll_loss, clean.nll_loss)  # of the experts 0 and 2
    assert gradients(result.loss, case)["hidden"][5:].isfinite().all()


def test_sequences_in_no_pair_may_be_infinite():
    """They have a slab of their own here, the first. (A GPU is not asked whether a slab counts.)"""
    case = make([5, 5, 5, 5], vocabulary=40, dtype=torch.float32)
    case["hidden"] = case["hidden"].detach().index_fill(0, torch.tensor([2]), float("inf")).requires_grad_()
    options = {"backend": "cpu", "buffer_mb": 5 * 40 * 4 / 2**20}
    pair = ops.pair_loss(**case, **options, beta=0.1, pairs=torch.tensor([[2, 3]])).loss
    for loss in (pair, ops.log_ratio(**case, **options).log_ratio[2:].sum()):
        actual = gradients(loss, case)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in actual.values())


@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 0], [0, 1]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_sizes_work(backend, lengths):
    for vocabulary, frozen, paired in itertools.product((1, 3), (False, True), (False, True)):
        case = make(lengths, vocabulary=vocabulary, frozen=frozen, bias=True)
        pairs = None if paired else torch.zeros(0, 2, dtype=torch.long)
        result = ops.pair_loss(**case, pairs=pairs, beta=0.1, nll_weight=0.5, backend=backend)
        assert all(x.isfinite().all() for x in result)
        assert all(gradient.isfinite().all() for gradient in gradients(result.loss, case).values())
        if not paired:
            assert result.loss == 0


@pytest.mark.parametrize(
    ("wants", "rows_in_buffer", "passes"),
    [("none", 1000, 1), ("hidden", 1000, 2), ("all", 1000, 3), ("hidden", 8, 2), ("all", 8, 3.75)],
    ids=["no gradient", "frozen", "full", "frozen, group beyond the buffer", "full, group beyond the buffer"],
)
def test_the_head_is_passed_over_as_often_as_documented(wants, rows_in_buffer, passes, monkeypatch):
    """Groups have 32 tokens. Beyond the buffer, all but the last 8, which are still in it, are computed twice."""
    monkeypatch.setattr(cpu_slab, "kernels", lambda operands: cpu_slab.EXACT)  # the recorder counts PyTorch's products
    case = make([20, 12, 12, 20], vocabulary=300, dtype=torch.float32, frozen=wants == "hidden")
    with Recorder() as recorder, torch.set_grad_enabled(wants != "none"):
        loss = ops.pair_loss(**case, beta=0.1, backend="cpu", buffer_mb=rows_in_buffer * 300 * 4 / 2**20).loss
        if wants != "none":
            loss.backward()
    assert recorder.operations == passes * 2 * 64 * 300 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows_in_buffer", [70, 10**6])
def test_no_tensor_of_all_tokens_by_vocabulary_is_ever_made(rows_in_buffer, frozen, dtype):
    lengths, vocabulary = [100] * 16, 8000
    case = make(lengths, vocabulary=vocabulary, size=8, dtype=dtype, frozen=frozen, softcap=30.0, reference="hidden")
    buffer_mb = rows_in_buffer * vocabulary * 4 / 2**20
    with Recorder() as recorder:
        ops.pair_loss(**case, beta=0.1, backend="cpu", buffer_mb=buffer_mb).loss.backward()
        ops.log_ratio(**case, backend="cpu", buffer_mb=buffer_mb).log_ratio.sum().backward()
    slab = max(rows_in_buffer * vocabulary, sum(lengths) * 11, vocabulary * 11)  # or hidden, or weight
    assert vocabulary * 8 <= recorder.largest <= min(slab, 32 * 2**20 // 4) < sum(lengths) * vocabulary


ERRORS = {
    "odd number of sequences": ([2, 1, 2], {}, "cu_seqlens: .*3 sequences.*even number"),
    "pairs of other shape": ([2, 3], {"pairs": torch.zeros(2, 3).long()}, r"pairs: found \[2, 3\].*\[P, 2\]"),
    "pairs are floats": ([2, 3], {"pairs": torch.zeros(2, 2)}, "pairs: found .*float32.*int64"),
    "pair beyond S": ([2, 3], {"pairs": torch.tensor([[0, 2]])}, "pairs: found 2, expected 0 <= value < 2"),
    "pair below 0": ([2, 3], {"pairs": torch.tensor([[-1, 0]])}, "pairs: found -1"),
    "beta is 0": ([2, 3], {"beta": 0.0}, "beta: found 0.0, expected a number > 0"),
    "beta is text": ([2, 3], {"beta": "0.1"}, "beta: found '0.1'"),
    "beta is nan": ([2, 3], {"beta": float("nan")}, "beta: found nan"),
    "unknown loss": ([2, 3], {"loss_type": "dpo"}, "loss_type: found 'dpo', expected 'sigmoid', .* a function"),
    "negative nll": ([2, 3], {"nll_weight": -1}, "nll_weight: found -1, expected a number >= 0"),
    "no pairs to divide by": ([2, 3], {"num_pairs": 0}, "num_pairs: found 0"),
    "no tokens to divide by": ([2, 3], {"num_tokens": 0}, "num_tokens: found 0"),
    "skip_mass is not below 1": ([2, 3], {"skip_mass": 1.0}, "skip_mass: found 1.0, expected a number >= 0 and < 1"),
    "unknown backend": ([2, 3], {"backend": "gpu"}, "backend: found 'gpu'"),
    "as log_ratio": ([2, 3], {"rows": torch.zeros(1).long()}, "rows: found"),
}


@pytest.mark.parametrize(("lengths", "arguments", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_names_argument_and_what_was_found_and_expected(lengths, arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.pair_loss(**{"beta": 0.1} | make(lengths) | arguments)
