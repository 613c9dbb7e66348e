"""log_ratio: the backends against each other and against loops, documented properties, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from irlfast import ops
from irlfast.ops.common import checks
from irlfast.ops.pair_loss import cpu_slab
from tests.helpers.ops_cases import Recorder, converted, gradients, make, sequences, token_by_token

BACKENDS = ["plain", "cpu"]
OPTIONS = [
    {},
    {"rows": True, "bias": True, "scale": 0.5, "softcap": 2.0, "ignored": True, "reference": "hidden"},
    {"rows": True, "frozen": True, "softcap": 2.0, "reference": "token"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["bare", "everything", "frozen"])
@pytest.mark.parametrize("buffer_mb", [1024, 1e-9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_all_statistics_are_the_derivative(backend, buffer_mb, options):
    case = make([2, 0, 3, 1], vocabulary=5, size=3, **options)
    names = [name for name in ("hidden", "weight", "bias") if getattr(case[name], "requires_grad", False)]

    def statistics(*leaves):
        result = ops.log_ratio(**case | dict(zip(names, leaves, strict=True)), backend=backend, buffer_mb=buffer_mb)
        return result.log_ratio, result.policy_logps, result.token_logps

    assert gradcheck(statistics, [case[name] for name in names])


@pytest.mark.parametrize("options", OPTIONS, ids=["bare", "everything", "frozen"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_those_of_a_loop_over_tokens(backend, options):
    case = make([2, 0, 3, 1], **options)
    expected = token_by_token(case)
    result = ops.log_ratio(**case, backend=backend)
    flat = [0.0 if x is None else x.item() for sequence in expected for x in sequence]
    sums = [sum(x.item() for x in sequence if x is not None) for sequence in expected]
    assert torch.allclose(result.token_logps, torch.tensor(flat).double())
    assert torch.allclose(result.policy_logps, torch.tensor(sums).double())
    assert torch.allclose(result.log_ratio, result.policy_logps - result.ref_logps)


@pytest.mark.parametrize("reference", ["hidden", "token", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ratio_is_policy_minus_reference_however_it_is_given(backend, reference):
    case = make([2, 0, 3, 4], reference=reference, ignored=True)
    result = ops.log_ratio(**case, backend=backend)
    if reference == "hidden":
        other = {"hidden": case["ref_hidden"], "weight": case["ref_weight"]}
        unwanted = ("ref_hidden", "ref_weight", "ref_bias")
        expected = ops.log_ratio(**{k: v for k, v in case.items() if k not in unwanted} | other).policy_logps
    elif reference == "token":
        scored = torch.where(case["targets"] >= 0, case["ref_logps"], 0)
        expected = torch.stack([part.sum() for part in scored.split([2, 0, 3, 4])])
    else:
        expected = case["ref_logps"]
    assert torch.allclose(result.ref_logps, expected)
    assert torch.allclose(result.log_ratio, result.policy_logps - expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_reference_the_ratio_is_the_log_probability(backend):
    result = ops.log_ratio(**make([3, 2]), backend=backend)
    assert torch.equal(result.log_ratio, result.policy_logps)
    assert not result.ref_logps.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_fp32_and_gradients_have_the_tensors_dtype(backend, dtype):
    case = make([3, 2], dtype=dtype, bias=True, reference="token")
    result = ops.log_ratio(**case, backend=backend)
    assert {x.dtype for x in result[:4]} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert {x.dtype for x in gradients(result.log_ratio.sum(), case).values()} == {dtype}


@pytest.mark.parametrize("reference", ["hidden", "cached"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_ratio_over_1024_tokens_is_within_1e_4_nats_of_fp64(backend, reference):
    policy = make([1024], vocabulary=4000, size=128, dtype=torch.bfloat16)
    policy |= {"hidden": (policy["hidden"] * 3).detach()}  # peaked rows, a sum of thousands of nats
    noise = torch.randn(policy["hidden"].shape, generator=torch.Generator().manual_seed(1)) * 0.02
    ref = {"ref_hidden": (policy["hidden"] + noise).bfloat16(), "ref_weight": policy["weight"].detach()}
    exact = ops.log_ratio(**converted(policy | ref, torch.float64), backend="plain")
    if reference == "cached":
        ref = {"ref_logps": ops.log_ratio(**policy | {"hidden": ref["ref_hidden"]}, backend=backend).token_logps}
    result = ops.log_ratio(**policy | ref, backend=backend)
    assert exact.policy_logps.item() < -3000
    assert abs(result.log_ratio.item() - exact.log_ratio.item()) < 1e-4


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer_mb", [1024, 0.1])
def test_equal_policy_and_reference_have_ratio_exactly_0_on_cpu(buffer_mb, dtype, frozen):
    case = make([100, 0, 37, 300], vocabulary=500, dtype=dtype, frozen=frozen, bias=True, softcap=30.0)
    ref = {"ref_hidden": case["hidden"], "ref_weight": case["weight"], "ref_bias": case["bias"]}
    assert not ops.log_ratio(**case, **ref, backend="cpu", buffer_mb=buffer_mb).log_ratio.any()
    assert not ops.pair_loss(**case, **ref, beta=0.1, backend="cpu", buffer_mb=buffer_mb).log_ratio.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_gets_no_gradient(backend):
    case = make([3, 2], reference="hidden")
    case["ref_hidden"].requires_grad_()
    case["ref_weight"].requires_grad_()
    ops.log_ratio(**case, backend=backend).log_ratio.sum().backward()
    assert case["ref_hidden"].grad is None and case["ref_weight"].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_added_to_all_logits_changes_nothing(backend):
    case = make([3, 0, 4], bias=True, reference="hidden", rows=True)
    shifted = case | {"bias": (case["bias"] + 100).detach().requires_grad_()}
    one, other = (ops.log_ratio(**x, backend=backend) for x in (case, shifted))
    assert torch.allclose(one.token_logps, other.token_logps)
    expected = gradients(one.log_ratio.sum(), case)
    for name, gradient in gradients(other.log_ratio.sum(), shifted).items():
        assert torch.allclose(gradient, expected[name], atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_used_twice_gets_the_sum_of_its_gradients(backend, frozen):
    case = make([3, 4], rows=True, frozen=frozen)
    rows = case["rows"]
    assert len(rows.unique()) < len(rows)
    spread = case | {"hidden": case["hidden"].detach()[rows].requires_grad_(), "rows": None}
    shared = gradients(ops.log_ratio(**case, backend=backend).log_ratio.sum(), case)["hidden"]
    apart = gradients(ops.log_ratio(**spread, backend=backend).log_ratio.sum(), spread)["hidden"]
    assert torch.allclose(shared, torch.zeros_like(shared).index_add(0, rows, apart))


@pytest.mark.parametrize("buffer_mb", [1024, 1e-9])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_sequence_stays_there(backend, frozen, buffer_mb):
    case = make([3, 2, 4, 1], dtype=torch.float32, frozen=frozen, reference="token")
    clean = ops.log_ratio(**case, backend=backend, buffer_mb=buffer_mb)
    hidden = case["hidden"].detach().clone()
    hidden[3] = float("nan")
    case["hidden"] = hidden.requires_grad_()
    result = ops.log_ratio(**case, backend=backend, buffer_mb=buffer_mb)
    others = torch.tensor([0, 2, 3])
    for name in ("log_ratio", "policy_logps"):
        assert torch.equal(getattr(result, name)[others], getattr(clean, name)[others])
        assert getattr(result, name)[1].isnan()
    assert torch.equal(result.token_logps.isnan().nonzero().flatten(), torch.tensor([3]))
    gradient = gradients(result.log_ratio.sum(), case)["hidden"]
    assert torch.equal(gradient.isnan().any(1).nonzero().flatten(), torch.tensor([3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_targets_do_not_count_whatever_their_hidden_row_holds(backend):
    case = make([3, 2], ignored=False)
    case["targets"][1] = -100
    case["hidden"] = case["hidden"].detach().index_fill(0, torch.tensor([1]), float("nan")).requires_grad_()
    result = ops.log_ratio(**case, backend=backend)
    assert result.token_logps[1] == 0 and result.log_ratio.isfinite().all()
    gradient = gradients(result.log_ratio.sum(), case)
    assert not gradient["hidden"][1].any() and gradient["weight"].isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_sizes_work(backend, frozen, lengths):
    for vocabulary in (1, 3):
        case = make(lengths, vocabulary=vocabulary, frozen=frozen, reference="token")
        result = ops.log_ratio(**case, backend=backend)
        assert result.log_ratio.shape == (len(lengths),) and result.token_logps.shape == (sum(lengths),)
        for gradient in gradients(result.log_ratio.sum(), case).values():
            assert gradient.isfinite().all()
            assert vocabulary > 1 or not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round_the_logits(backend):
    case = make([3, 5], vocabulary=100, dtype=torch.bfloat16, reference="token")
    expected = ops.log_ratio(**case, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        result = ops.log_ratio(**case, backend=backend)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(result.log_ratio, expected.log_ratio)


@pytest.mark.parametrize(
    ("frozen", "grad", "passes"), [(False, False, 1), (True, True, 2), (False, True, 4)], ids=["none", "frozen", "full"]
)
def test_the_head_is_passed_over_as_often_as_documented(frozen, grad, passes, monkeypatch):
    monkeypatch.setattr(cpu_slab, "kernels", lambda operands: cpu_slab.EXACT)  # the recorder counts PyTorch's products
    case = make([40, 0, 24], vocabulary=300, dtype=torch.float32, frozen=frozen)
    with Recorder() as recorder, torch.set_grad_enabled(grad):
        result = ops.log_ratio(**case, backend="cpu", buffer_mb=0.01)
        if grad:
            result.log_ratio.sum().backward()
    assert recorder.operations == passes * 2 * 64 * 300 * 8


def test_cpu_backend_needs_no_transformers_nor_triton():
    """Kernels are imported in their branch only, so that a machine without Triton imports the operations."""
    code = "import sys, irlfast.ops; assert not {'triton', 'transformers', 'deepspeed'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


ERRORS = {
    "hidden is not a matrix": ({"hidden": torch.zeros(3)}, r"hidden: found \[3\] float32 on cpu, expected \[R, H\]"),
    "hidden is not a float": ({"hidden": torch.zeros(5, 8).long()}, r"hidden: found \[5, 8\] int64"),
    "hidden is not a tensor": ({"hidden": None}, "hidden: found None, expected"),
    "hidden has other rows": ({"hidden": torch.zeros(6, 8).double()}, "hidden: .*expected 5 rows, as targets"),
    "weight has other columns": ({"weight": torch.zeros(7, 9).double()}, r"weight: found \[7, 9\].*\[V, 8\]"),
    "weight is not a float": ({"weight": torch.zeros(7, 8).long()}, "weight: .*int64.*expected .*float64"),
    "weight is elsewhere": (
        {"weight": torch.zeros(7, 8, device="meta").double()},
        "weight: .* on meta, expected .*cpu",
    ),
    "weight is empty": ({"weight": torch.zeros(0, 8).double()}, "weight: .*V > 0"),
    "bias has other size": ({"bias": torch.zeros(6).double()}, r"bias: found \[6\].*expected \[7\]"),
    "targets are floats": ({"targets": torch.zeros(5)}, "targets: found .*float32.*int64"),
    "target beyond V": ({"targets": torch.tensor([0, 7, 0, 0, 0])}, "targets: found 7, expected 0 <= value < 7.*-100"),
    "target below 0": ({"targets": torch.tensor([0, -1, 0, 0, 0])}, "targets: found -1"),
    "cu_seqlens is int64": ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: found .*int64.*int32"),
    "cu_seqlens is empty": ({"cu_seqlens": sequences([])[:0]}, "cu_seqlens: .*at least"),
    "cu_seqlens starts late": ({"cu_seqlens": sequences([3, 2])[1:]}, r"cu_seqlens\[0\]: found 3, expected 0"),
    "cu_seqlens ends early": ({"cu_seqlens": sequences([3])}, r"cu_seqlens\[-1\]: found 3, expected 5"),
    "cu_seqlens decreases": ({"cu_seqlens": sequences([3, -1, 3])}, "cu_seqlens: .*-1.*decrease"),
    "rows has other size": ({"rows": torch.zeros(4).long()}, r"rows: found \[4\].*expected \[5\]"),
    "row beyond R": ({"rows": torch.tensor([0, 5, 0, 0, 0])}, "rows: found 5, expected 0 <= value < 5"),
    "two references": (
        {"ref_logps": torch.zeros(5), "ref_hidden": torch.zeros(5, 2), "ref_weight": torch.zeros(7, 2)},
        "ref_logps: .*expected None where ref_hidden is given",
    ),
    "half a reference": ({"ref_hidden": torch.zeros(5, 2)}, "ref_weight: found None"),
    "the other half": ({"ref_weight": torch.zeros(7, 2)}, "ref_weight: .*expected None where ref_hidden is None"),
    "reference bias alone": ({"ref_bias": torch.zeros(7)}, "ref_bias: .*expected None"),
    "reference of other rows": (
        {"ref_hidden": torch.zeros(4, 2), "ref_weight": torch.zeros(7, 2)},
        "ref_hidden: .*5 rows",
    ),
    "reference of other V": (
        {"ref_hidden": torch.zeros(5, 2), "ref_weight": torch.zeros(6, 2)},
        "ref_weight: .*7 rows",
    ),
    "cached of other size": ({"ref_logps": torch.zeros(3)}, r"ref_logps: .*expected \[5\].*or \[2\]"),
    "cached is integer": ({"ref_logps": torch.zeros(5).long()}, "ref_logps: found .*int64"),
    "scale is not finite": ({"logit_scale": float("inf")}, "logit_scale: found inf"),
    "softcap is 0": ({"logit_softcap": 0.0}, "logit_softcap: found 0.0, expected None or a number > 0"),
    "no buffer": ({"buffer_mb": 0}, "buffer_mb: found 0"),
    "unknown backend": ({"backend": "gpu"}, "backend: found 'gpu', expected 'auto', 'plain', 'cpu'"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_names_argument_and_what_was_found_and_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.log_ratio(**make([3, 2]) | arguments)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_triton_on_cpu_tensors_says_what_it_needs():
    with pytest.raises(ValueError, match=r"hidden: found .* on cpu, expected a tensor on a GPU"):
        ops.log_ratio(**make([3, 2]), backend="triton")


def test_a_missing_triton_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install 'triton"):
        ops.log_ratio(**make([3, 2]), backend="triton")
