"""token_divergence: the backends against the oracle and against TRL's losses, documented properties, errors."""

import itertools
import math
from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from irlfast import ops
from irlfast.ops.divergence import custom_op
from irlfast.ops.pair_loss import cpu_slab
from tests.helpers.divergence_cases import (
    DTYPES,
    FACTORS,
    KINDS,
    TOP_K,
    check_against_fp64,
    check_mixed,
    identical,
    make,
)
from tests.helpers.ops_cases import Recorder, converted, gradients
from tests.helpers.tiers import covering_cases, first_then_full, full, sweep

BACKENDS = ["plain", "cpu"]
EVERYTHING = {"bias": True, "scale": 0.7, "softcap": 3.0, "ref_softcap": 2.0, "temperature": 1.7, "rows": "reference"}


@pytest.mark.parametrize("factors", covering_cases(FACTORS, beyond=full, drawn=300))
def test_cpu_matches_the_oracle_in_fp64(factors):
    case = make(**factors)
    with mock.patch.object(cpu_slab, "kernels", lambda operands: cpu_slab.EXACT):
        check_against_fp64(case, "cpu")
    if factors["dtype"] == torch.bfloat16:
        check_against_fp64(case, "cpu", narrow_products=True)


@sweep(kind=KINDS, top_k=TOP_K, frozen=[False, True], options=[{}, EVERYTHING], backend=BACKENDS)
def test_the_gradient_is_the_derivative(kind, top_k, frozen, options, backend):
    case = make(kind=kind, share=0.3, top_k=top_k, frozen=frozen, count=4, size=3, rows_in_buffer=3, **options)
    names = [name for name in ("hidden", "weight", "bias") if getattr(case[name], "requires_grad", False)]

    def divergence(*leaves):
        return ops.token_divergence(**case | dict(zip(names, leaves, strict=True)), backend=backend)

    assert gradcheck(divergence, [case[name] for name in names])


def distributions(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of policy and reference, without options."""
    return tuple((case[f"{who}hidden"] @ case[f"{who}weight"].T).log_softmax(-1).detach() for who in ("", "ref_"))


def test_each_kind_is_its_definition():
    case = make(vocabulary=11)
    q, r = (logps.exp() for logps in distributions(case))

    def kl(p, m):
        return (p * (p / m).log()).sum(-1)

    middle = 0.2 * r + 0.8 * q
    expected = {
        "forward_kl": kl(r, q),
        "reverse_kl": kl(q, r),
        "jensen_shannon": 0.2 * kl(r, middle) + 0.8 * kl(q, middle),
        "skew_forward_kl": kl(r, middle),
        "skew_reverse_kl": kl(q, 0.2 * q + 0.8 * r),
    }
    for kind, backend in [(kind, backend) for kind in KINDS for backend in BACKENDS]:
        case |= {"kind": kind, "beta": 0.2, "alpha": 0.2}
        torch.testing.assert_close(ops.token_divergence(**case, backend=backend).detach(), expected[kind])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_trls_gkd_loss_and_ligers_jensen_shannon(backend):
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction.distillation_loss_fn
    case = make(vocabulary=30, bias=True, temperature=1.7)
    policy, reference = (case[f"{who}hidden"] @ case[f"{who}weight"].T + case[f"{who}bias"] for who in ("", "ref_"))
    for beta, kind in ((0, "forward_kl"), (1, "reverse_kl"), (0.3, "jensen_shannon")):
        actual = ops.token_divergence(**case | {"kind": kind, "beta": 0.3}, backend=backend)
        theirs = trl(policy[:, None], reference[:, None], beta=beta, temperature=1.7, reduction="sum")
        torch.testing.assert_close(actual.sum(), theirs)
        torch.testing.assert_close(actual.sum(), liger(policy / 1.7, reference / 1.7, beta=beta))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_of_the_policy_is_trls_loss_of_self_distillation(backend, tail):
    theirs = pytest.importorskip("trl.experimental.sdft.loss_utils").compute_topk_self_distillation_loss
    case = make(vocabulary=30)
    logits = [case[f"{who}hidden"] @ case[f"{who}weight"].T for who in ("", "ref_")]
    for alpha, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl"), (0.3, "jensen_shannon")):
        options = {"kind": kind, "beta": 0.3, "top_k": 4, "top_k_of": "policy", "tail": tail}
        actual = ops.token_divergence(**case | options, backend=backend)
        expected = theirs(*logits, distillation_topk=4, distillation_alpha=alpha, distillation_add_tail=tail)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_with_a_tail_is_at_most_the_full_divergence_and_tends_to_it(backend, kind):
    case = make(vocabulary=30, kind=kind, count=40)
    results = [ops.token_divergence(**case, top_k=k, backend=backend).detach() for k in range(1, 31)]
    whole = ops.token_divergence(**case, backend=backend).detach()
    for few, more in itertools.pairwise(results):
        assert (few <= more + 1e-12).all()
    assert torch.equal(results[-1], whole)
    assert torch.equal(ops.token_divergence(**case, top_k=10**6, tail=False, backend=backend), whole)


@sweep(kind=KINDS, top_k=TOP_K, dtype=[torch.float32, torch.bfloat16], frozen=[False, True], share=[0.5, 0.1, 0.3])
def test_equal_distributions_have_divergence_0_and_no_gradient(kind, top_k, dtype, frozen, share):
    """fp64 is left out: 0.1 + 0.9 need not be 1 there."""
    case = identical(
        make(kind=kind, share=share, top_k=top_k, dtype=dtype, frozen=frozen, vocabulary=500, size=64)
        | {"logit_scale": 1.1, "logit_softcap": 30.0, "temperature": 1.3}
    )
    result = ops.token_divergence(**case, backend="cpu")
    assert result.eq(0).all()
    assert not any(gradient.any() for gradient in gradients(result.sum(), case).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_near_its_reference_keeps_its_digits(kind):
    """Logits 1e-3 apart have divergences of 1e-6 and less. PyTorch's, from log-probabilities in fp32, err by 1e-6."""
    case = identical(make(kind=kind, vocabulary=1000, size=64, dtype=torch.float32, scale=3.0))
    noise = torch.randn(case["hidden"].shape, generator=torch.Generator().manual_seed(2)) * 3e-4
    case["ref_hidden"] = case["hidden"].detach() + noise
    double = converted(case, torch.float64)
    exact = ops.token_divergence(**double, backend="plain")
    assert exact.max() < 3e-6
    result = ops.token_divergence(**case, backend="cpu")
    torch.testing.assert_close(result.double(), exact, rtol=0.02, atol=6e-8)  # half an ulp of 1
    gradient = gradients(result.sum(), case)["hidden"]
    torch.testing.assert_close(gradient.double(), gradients(exact.sum(), double)["hidden"], rtol=0.02, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_10000_give_no_nan(backend, top_k, kind):
    case = make(kind=kind, top_k=top_k, dtype=torch.float32, vocabulary=40, size=8)
    double = converted(case, torch.float64)
    for each in (case, double):
        for who in ("", "ref_"):
            spread = 1e4 / (each[f"{who}hidden"] @ each[f"{who}weight"].T).abs().max().item()
            each[f"{who}hidden"] = (each[f"{who}hidden"] * spread).detach().requires_grad_(who == "")
    result = ops.token_divergence(**case, backend=backend)
    expected = ops.token_divergence(**double, backend="plain")
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-2)  # an ulp of 1e4 is 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients(result.sum(), case).values())


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("vocabulary", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", ["none", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_and_a_vocabulary_of_one_token_work(backend, rows, frozen, vocabulary, count):
    case = make(kind="jensen_shannon", vocabulary=vocabulary, count=count, frozen=frozen, bias=True, rows=rows)
    result = ops.token_divergence(**case, backend=backend)
    assert result.shape == (count,)
    assert vocabulary > 1 or not result.any()
    for name, gradient in gradients(result.sum(), case).items():
        assert gradient.shape == case[name].shape and gradient.isfinite().all()
        assert (vocabulary > 1 and count) or not gradient.any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_one_row_stays_there(backend, frozen):
    case = make(dtype=torch.float32, frozen=frozen, kind="jensen_shannon", rows_in_buffer=4)
    clean = ops.token_divergence(**case, backend=backend)
    case["hidden"] = case["hidden"].detach().index_fill(0, torch.tensor([3]), math.nan).requires_grad_()
    result = ops.token_divergence(**case, backend=backend)
    others = torch.arange(10) != 3
    assert torch.equal(result[others], clean[others]) and result[3].isnan()
    gradient = gradients(result.sum(), case)["hidden"]
    assert torch.equal(gradient.isnan().any(1), ~others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_gets_no_gradient(backend):
    case = make()
    case["ref_hidden"].requires_grad_()
    case["ref_weight"].requires_grad_()
    ops.token_divergence(**case, backend=backend).sum().backward()
    assert case["ref_hidden"].grad is None and case["ref_weight"].grad is None


@pytest.mark.parametrize(
    ("frozen", "grad", "passes"), [(False, False, 2), (True, True, 3), (False, True, 6)], ids=["none", "frozen", "full"]
)
def test_the_heads_are_passed_over_as_often_as_documented(frozen, grad, passes, monkeypatch):
    monkeypatch.setattr(cpu_slab, "kernels", lambda operands: cpu_slab.EXACT)  # the recorder counts PyTorch's products
    case = make(count=64, vocabulary=300, dtype=torch.float32, frozen=frozen, rows_in_buffer=10)
    case |= {"ref_hidden": case["ref_hidden"][:, :8], "ref_weight": case["ref_weight"][:, :8]}
    with Recorder() as recorder, torch.set_grad_enabled(grad):
        result = ops.token_divergence(**case, backend="cpu")
        if grad:
            result.sum().backward()
    assert recorder.operations == passes * 2 * 64 * 300 * 8


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_of_all_rows_by_vocabulary_is_ever_made(frozen, top_k):
    case = make(count=1600, vocabulary=8000, dtype=torch.bfloat16, frozen=frozen, softcap=30.0, top_k=top_k)
    with Recorder() as recorder:
        ops.token_divergence(**case | {"buffer_mb": 70 * 8000 * 8 / 2**20}, backend="cpu").sum().backward()
    assert 8000 * 11 <= recorder.largest <= 8000 * 70


# ---------------------------------------------------------------- compiled, checkpointed, under autocast, mixed dtypes

FORMS = {
    "everything": EVERYTHING | {"top_k": "reference's, others as one"},
    "plain head": {},
    "frozen": {"frozen": True, "rows": "both"},
}


@pytest.mark.parametrize("form", first_then_full(FORMS))
def test_compiles_as_one_graph_of_any_length(form):
    torch.compiler.reset()
    compiled = torch.compile(ops.token_divergence, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (10, 7, 12):
        case = make(kind="jensen_shannon", vocabulary=33, size=18, dtype=torch.float32, count=count, **FORMS[form])
        with torch._dynamo.config.patch(error_on_recompile=True):
            expected, actual = ops.token_divergence(**case), compiled(**case)
        assert torch.equal(actual, expected)
        exact = gradients(expected.sum(), case)
        for name, gradient in gradients(actual.sum(), case).items():
            assert torch.equal(gradient, exact[name]), name


@pytest.mark.parametrize("form", first_then_full(FORMS))
def test_torch_accepts_the_registered_operations(form):
    case = make(kind="jensen_shannon", vocabulary=33, dtype=torch.float32, **FORMS[form])
    calls = []
    forward = custom_op.forward
    with mock.patch.object(custom_op, "forward", lambda *args: calls.append(args) or forward(*args)):
        result = ops.token_divergence(**case, backend="cpu")
    [arguments] = calls
    torch.library.opcheck(forward, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[:-1]]
    wanted = [tensor is not None and tensor.requires_grad for tensor in arguments[:3]]
    torch.library.opcheck(custom_op.backward, (torch.randn(result.shape), *detached, wanted))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_under_autocast_changes_no_bit(reentrant):
    case = make(kind="jensen_shannon", dtype=torch.float32, vocabulary=33, **EVERYTHING)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return ops.token_divergence(**case | {"hidden": hidden.tanh()}).square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        expected = loss(case["hidden"])
        actual = checkpoint(loss, case["hidden"], use_reentrant=reentrant)
    exact = gradients(expected, case)
    actual.backward()
    assert torch.equal(actual, expected)
    for name, gradient in exact.items():
        assert torch.equal(case[name].grad, gradient), name


@pytest.mark.parametrize("factors", covering_cases(DTYPES, beyond=full, drawn=100))
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_in_the_less_precise_dtype_and_gradients_in_each_tensors_own(backend, factors):
    check_mixed(factors, backend, "cpu")


# ---------------------------------------------------------------- errors

ERRORS = {
    "unknown kind": ({"kind": "kl"}, "kind: found 'kl', expected 'forward_kl', 'reverse_kl', 'jensen_shannon'"),
    "beta at an end": ({"beta": 0}, "beta: found 0, expected a number > 0 and < 1"),
    "alpha is text": ({"alpha": "0.1"}, "alpha: found '0.1'"),
    "temperature is 0": ({"temperature": 0.0}, "temperature: found 0.0, expected a number > 0"),
    "top_k is 0": ({"top_k": 0}, "top_k: found 0, expected None or a number of tokens > 0"),
    "top_k of nobody": ({"top_k": 2, "top_k_of": "teacher"}, "top_k_of: found 'teacher', expected 'reference'"),
    "reference of other V": ({"ref_weight": torch.zeros(6, 11).double()}, r"ref_weight: found \[6, 11\].*7 rows"),
    "reference of other rows": ({"ref_hidden": torch.zeros(4, 11).double()}, r"ref_hidden: found \[4, 11\].*10 rows"),
    "row beyond R": ({"rows": torch.tensor([0, 10])}, "rows: found 10, expected 0 <= value < 10, the rows of hidden"),
    "ref_rows of other size": ({"ref_rows": torch.zeros(4).long()}, r"ref_rows: found \[4\] int64.*10 rows"),
    "soft-cap is 0": ({"ref_logit_softcap": 0.0}, "ref_logit_softcap: found 0.0"),
    "no buffer": ({"buffer_mb": 0}, "buffer_mb: found 0"),
    "cuda": ({"backend": "cuda"}, "backend: found 'cuda', expected 'auto', 'plain', 'cpu' or 'triton'"),
    "weight has other columns": ({"weight": torch.zeros(7, 9).double()}, r"weight: found \[7, 9\]"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_names_argument_and_what_was_found_and_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.token_divergence(**make() | arguments)
