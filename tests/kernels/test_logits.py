"""token_logps and logits_log_ratio on a GPU: each backend against the oracle in fp64, and documented properties."""

import pytest
import torch

from irlfast import ops
from irlfast.ops.common import checks
from irlfast.ops.logits import custom_op
from tests.helpers.ops_cases import sequences
from tests.helpers.tiers import sweep
from tests.kernels.device import DEVICE
from tests.ops.test_logits import LENGTHS, OPTIONS, REFERENCES, check_against_fp64, combined, in_fp64, make


@sweep(vocabulary=[1, 7, 1000, 32000, 50304], dtype=[torch.float32, torch.bfloat16, torch.float16], options=OPTIONS)
def test_matches_the_oracle_in_fp64(vocabulary, dtype, options, backend):
    check_against_fp64(make([2, 0, 3], vocabulary, dtype, reference="logits", device=DEVICE), backend, **options)


@sweep(lengths=[[], [0, 0], [0, 1], [1, 1], LENGTHS, [63]], reference=REFERENCES)
def test_empty_and_tiny_inputs_match_the_oracle(reference, lengths, backend):
    check_against_fp64(make(lengths, 33, torch.float32, reference=reference, device=DEVICE), backend)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_of_zero_or_below_matches_the_oracle(scale, backend):
    check_against_fp64(make(LENGTHS, 33, torch.float32, reference="logits", device=DEVICE), backend, logit_scale=scale)


def test_large_logits_and_a_sharp_row_match_the_oracle(backend):
    case = make(LENGTHS, 1000, torch.float32, reference="logits", spread=25, device=DEVICE)
    case["logits"].data.clamp_(-80, 80)[0, 3] = 200
    check_against_fp64(case, backend)
    check_against_fp64(case, backend, logit_softcap=30.0)


def test_a_small_logit_under_the_softcap_keeps_its_digits(backend):
    """tanh near 0 must not cancel: its error would add up over the tokens of an answer."""
    logits = torch.linspace(-20, 20, 201, device=DEVICE)[:, None] * torch.tensor([1.0, 0], device=DEVICE)
    targets = torch.zeros(201, dtype=torch.long, device=DEVICE)
    exact = ops.token_logps(logits.double(), targets, logit_softcap=30.0, backend="plain")
    actual = ops.token_logps(logits, targets, logit_softcap=30.0, backend=backend)
    assert ((actual.double() - exact).abs() <= 4e-7 * exact.abs().clamp(min=1)).all()
    assert abs((actual.double() - exact).sum()) < 1e-4


def test_a_sequence_of_1024_bf16_tokens_is_within_1e_4_nats(backend):
    tokens = 1024 if DEVICE == "cuda" else 128  # the interpreter takes 5 ms a row
    case = make([tokens], 100, torch.bfloat16, reference="logits", ignored=False, device=DEVICE)
    exact = ops.logits_log_ratio(**in_fp64(case), backend="plain")
    result = ops.logits_log_ratio(**case, backend=backend)
    assert abs(result.log_ratio.double() - exact.log_ratio) < 1e-4 * tokens / 1024


@pytest.mark.parametrize("per_token", [False, True])
def test_sums_of_thousands_of_tokens_lose_nothing(per_token, backend):
    lengths = [1024, 0, 3000, 1]
    cu_seqlens, total = sequences(lengths).to(DEVICE), sum(lengths)
    logps, ref_logps = (-10 * torch.rand(2, total, generator=torch.Generator().manual_seed(0)).to(DEVICE)).unbind()
    targets = torch.arange(total, device=DEVICE) % 5
    targets[targets == 0] = -100
    logps[targets == -100] = 0
    if not per_token:
        ref_logps = ref_logps[:4]
    sums = custom_op.sequence_sums(logps, targets, cu_seqlens, ref_logps, backend).double()
    policy = torch.stack([part.double().sum() for part in logps.split(lengths)])
    reference = ref_logps.double()
    if per_token:
        reference = torch.stack([part.double().sum() for part in ref_logps.where(targets >= 0, 0).split(lengths)])
    for actual, exact in zip(sums, (policy - reference, policy, reference), strict=True):
        assert ((actual - exact).abs() <= exact.abs() * 2**-24 + 1e-9).all()


@sweep(options=OPTIONS, dtype=[torch.float32, torch.bfloat16])
def test_the_policy_as_its_own_reference_has_ratio_0(dtype, options, backend):
    case = make(LENGTHS, 1000, dtype, device=DEVICE)
    same = case["logits"].detach().clone()
    result = ops.logits_log_ratio(**case, ref_logits=same, **options, backend=backend)
    assert not result.log_ratio.any() and result.policy_logps.any()
    assert torch.equal(result.policy_logps, result.ref_logps) and not result.ref_logps.requires_grad


def test_the_reference_may_have_another_dtype(backend):
    case = make(LENGTHS, 100, torch.bfloat16, reference="logits", device=DEVICE)
    case["ref_logits"] = case["ref_logits"].float() + 0.001
    check_against_fp64(case, backend)


def test_a_constant_added_to_a_row_changes_nothing(backend):
    case = make(LENGTHS, 100, torch.float32, device=DEVICE)
    logits = (case["logits"].detach() * 64).round() / 64  # such that fp32 holds the sums
    moved = logits + torch.tensor([-512.0, 64, 1024], device=DEVICE).repeat(6)[: len(logits), None]
    one, other = (ops.token_logps(z, case["targets"], backend=backend) for z in (logits, moved))
    assert torch.equal(one, other)


@pytest.mark.parametrize("distance", [1000, 1008, 1013, 4096])
def test_rows_may_be_any_distance_apart(distance, backend):
    case = make(LENGTHS, 1000, torch.float32, reference="logits", device=DEVICE)
    wide = torch.full((2, len(case["logits"]), distance), float("nan"), device=DEVICE)
    wide[0, :, :1000], wide[1, :, :1000] = case["logits"].detach(), case["ref_logits"]
    case["targets"] = case["targets"].int()
    check_against_fp64(case | {"logits": wide[0, :, :1000].requires_grad_(), "ref_logits": wide[1, :, :1000]}, backend)


@pytest.mark.parametrize("distance", [1000, 1013])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_writes_the_same_gradient_over_the_logits(dtype, distance, backend):
    case = make(LENGTHS, 1000, dtype, reference="logits", device=DEVICE)
    [expected] = torch.autograd.grad(combined(ops.logits_log_ratio(**case, backend=backend)), case["logits"])
    wide = torch.zeros(len(expected), distance, dtype=dtype, device=DEVICE)
    wide[:, :1000] = case["logits"].detach()
    logits = wide[:, :1000].requires_grad_()
    result = ops.logits_log_ratio(**case | {"logits": logits}, inplace_backward=True, backend=backend)
    [gradient] = torch.autograd.grad(combined(result), logits, retain_graph=True)
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == logits.data_ptr()
    assert not wide[:, 1000:].any()
    with pytest.raises(RuntimeError, match="inplace_backward=True: the first backward wrote over the logits"):
        torch.autograd.grad(combined(result), logits)


def test_nan_and_infinity_stay_in_their_rows(backend):
    case = make([3, 2, 4], 10, torch.float32, reference="logits", ignored=False, device=DEVICE)
    clean = ops.logits_log_ratio(**case, backend=backend)
    broken = case["logits"].detach().clone()
    broken[3, 4], broken[4, 2] = float("nan"), float("inf")
    case["logits"] = broken.requires_grad_()
    for skipped in (False, True):
        if skipped:
            case["targets"][4] = -100  # nothing of a skipped row is ever looked at
        result = ops.logits_log_ratio(**case, backend=backend)
        for one, other in zip(clean[:3], result[:3], strict=True):
            assert torch.equal(one[[0, 2]], other[[0, 2]])
        assert result.token_logps[3].isnan() and result.token_logps[4].isnan() == (not skipped)
        assert result.log_ratio[1].isnan() and result.ref_logps[1].isfinite()
        [gradient] = torch.autograd.grad(combined(result), case["logits"], retain_graph=True)
        assert gradient[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()
        assert gradient[3].isnan().all() and gradient[4].any() == (not skipped)
        upstream = torch.tensor([1.0, 0, 0], device=DEVICE)  # nor of a sequence that the loss leaves alone
        [gradient] = torch.autograd.grad(result.log_ratio, case["logits"], upstream)
        assert gradient.isfinite().all() and not gradient[3:].any()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_minus_infinity_have_no_probability(softcap, backend):
    """Whole blocks are −∞ too: a lane that has no other logit must not compute −∞ − −∞, which is NaN."""
    case = make([4], 20000, torch.float32, ignored=False, device=DEVICE)
    case["logits"].data[:, 3:] = float("-inf")
    case["targets"][:] = torch.tensor([0, 1, 2, 5])
    case["logits"].data[3] = float("-inf")
    exact = ops.token_logps(case["logits"].double(), case["targets"], logit_softcap=softcap, backend="plain")
    actual = ops.token_logps(case["logits"], case["targets"], logit_softcap=softcap, backend=backend)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
    [gradient] = torch.autograd.grad(actual[:3].sum(), case["logits"])
    assert gradient.isfinite().all() and not gradient[:, 3:].any() and gradient[:3, :3].all()


def test_a_target_outside_the_vocabulary_is_nan_where_values_are_not_checked(monkeypatch, backend):
    monkeypatch.setattr(checks, "values_visible", lambda device: False)
    logits, targets = torch.zeros(4, 7, device=DEVICE), torch.tensor([7, -1, 10**12, 3], device=DEVICE)
    assert ops.token_logps(logits, targets, backend=backend).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("reference", [False, True])
def test_torch_accepts_the_registered_operations(reference, backend):
    case = make(LENGTHS, 7, torch.float32, reference="logits", device=DEVICE)
    logits, targets, ref_logits = case["logits"], case["targets"], case["ref_logits"] if reference else None
    torch.library.opcheck(custom_op.forward, (logits, targets, ref_logits, 0.5, 30.0, False, backend))
    lse, upstream = torch.randn(2, sum(LENGTHS), device=DEVICE)
    rest = logits.detach(), targets, lse, upstream, 0.5, None, backend
    torch.library.opcheck(custom_op.write_gradient, (torch.empty_like(logits), *rest))
    logps, ref_logps = lse.requires_grad_(), upstream if reference else None
    torch.library.opcheck(custom_op.sequence_sums, (logps, targets, case["cu_seqlens"], ref_logps, backend))


@pytest.mark.parametrize("reference", REFERENCES)
def test_compiles_as_one_graph(reference, backend):
    def loss(case):
        result = ops.logits_log_ratio(**case, logit_softcap=30.0, inplace_backward=True, backend=backend)
        return result.log_ratio.square().sum() - result.policy_logps[0] + result.token_logps[3]

    torch.compiler.reset()
    case = make(LENGTHS, 7, torch.float32, reference=reference, device=DEVICE)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)(case)
    [gradient] = torch.autograd.grad(actual, case["logits"])
    expected = loss(case)
    [exact] = torch.autograd.grad(expected, case["logits"])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, exact)


def test_fp64_is_refused(backend):
    with pytest.raises(ValueError, match=rf"logits: found .*float64.*by backend '{backend}'"):
        ops.token_logps(torch.zeros(1, 2, device=DEVICE).double(), torch.zeros(1).long().to(DEVICE), backend=backend)
