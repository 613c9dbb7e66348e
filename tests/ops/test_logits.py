"""token_logps and logits_log_ratio: the oracle against loops, the cpu backend against the oracle, errors."""

import itertools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from irlfast import native, ops
from irlfast.ops.common import checks
from irlfast.ops.logits import cpu_rows
from tests.helpers.ops_cases import sequences

BACKENDS = ["plain", "cpu"]
LENGTHS = [5, 3, 0, 7, 1, 0]
REFERENCES = ["none", "logits", "token", "sequence"]
OPTIONS = [{}, {"logit_scale": 0.5}, {"logit_softcap": 3.0}, {"logit_scale": -0.7, "logit_softcap": 30.0}]


def make(
    lengths: list[int],
    vocabulary: int,
    dtype: torch.dtype = torch.float64,
    *,
    reference: str = "none",
    ignored: bool = True,
    spread: float = 3.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of ``logits_log_ratio``."""
    random = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    logits, ref_logits = ((torch.randn(tokens, vocabulary, generator=random) * spread).to(dtype) for _ in range(2))
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    if ignored:
        targets[torch.rand(tokens, generator=random) < 0.3] = -100
    case = {"logits": logits, "targets": targets, "cu_seqlens": sequences(lengths)}
    if reference == "logits":
        case["ref_logits"] = ref_logits
    elif reference != "none":
        case["ref_logps"] = -torch.rand(tokens if reference == "token" else len(lengths), generator=random)
    case = {name: value.to(device) for name, value in case.items()}
    case["logits"].requires_grad_()
    return case


def in_fp64(case: dict[str, Any]) -> dict[str, Any]:
    double = {name: value.detach().double() if value.is_floating_point() else value for name, value in case.items()}
    double["logits"].requires_grad_()
    return double


def combined(result: Any) -> torch.Tensor:
    """A loss with a different weight for every statistic that carries a gradient; some sequences have weight 0."""
    random = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=result.token_logps.device)
    for statistic in (result.log_ratio, result.policy_logps, result.token_logps):
        weights = torch.randn(statistic.shape, generator=random, dtype=torch.float64)
        weights[::3] = 0
        total = total + (statistic * weights.to(statistic.device)).sum()
    return total


def check_against_fp64(case: dict[str, Any], backend: str, **options: Any) -> None:
    double, dtype = in_fp64(case), case["logits"].dtype
    exact = ops.logits_log_ratio(**double, **options, backend="plain")
    result = ops.logits_log_ratio(**case, **options, backend=backend)
    for name, actual, expected in zip(result._fields[:4], result[:4], exact[:4], strict=True):
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=5e-6, equal_nan=True, msg=name)
    assert torch.equal(
        result.token_logps,
        ops.token_logps(case["logits"], case["targets"], **options, backend=backend),
    )
    [expected] = torch.autograd.grad(combined(exact), double["logits"])
    [actual] = torch.autograd.grad(combined(result), case["logits"])
    assert actual.dtype == dtype
    # Rounded once to the dtype of the logits: half a unit in the last place, and what fp32 errs by.
    half_ulp = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).tiny  # below it, fp16 has fewer digits
    bound = expected.abs() * half_ulp * 1.01 + expected.abs().amax(1, keepdim=True) * 2e-5 + tiny
    assert ((actual.double() - expected).abs() <= bound).all()


# ---------------------------------------------------------------- results and gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reference", REFERENCES)
def test_matches_loops_over_tokens(reference, options, backend):
    case = make(LENGTHS, 7, reference=reference)
    result = ops.logits_log_ratio(**case, **options, backend=backend)
    scale, cap = options.get("logit_scale", 1.0), options.get("logit_softcap")

    def logp(z: torch.Tensor, target: int) -> float:
        z = z.detach() * scale if cap is None else cap * (z.detach() * scale / cap).tanh()
        return (z[target] - z.exp().sum().log()).item()

    for s, (start, end) in enumerate(itertools.pairwise(case["cu_seqlens"].tolist())):
        scored = [(n, t) for n, t in enumerate(case["targets"].tolist()) if start <= n < end and t >= 0]
        policy = sum(logp(case["logits"][n], t) for n, t in scored)
        if reference == "logits":
            ref = sum(logp(case["ref_logits"][n], t) for n, t in scored)
        elif reference == "token":
            ref = sum(case["ref_logps"][n].item() for n, _ in scored)
        else:
            ref = case["ref_logps"][s].item() if reference == "sequence" else 0.0
        actual = [x[s].item() for x in result[:3]]
        assert actual == pytest.approx([policy - ref, policy, ref], rel=1e-12, abs=1e-12)
    for n, target in enumerate(case["targets"].tolist()):
        expected = logp(case["logits"][n], target) if target >= 0 else 0
        assert result.token_logps[n].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rows", [None, 1, 4, 1000], ids=lambda rows: f"{rows} rows" if rows else "native")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 7, 1000])
def test_cpu_matches_the_oracle_in_fp64_whatever_the_chunk(vocabulary, dtype, options, rows, monkeypatch):
    if rows:
        monkeypatch.setattr(native, "cpu", None)
        monkeypatch.setattr(cpu_rows, "CHUNK_BYTES", rows * 4 * vocabulary)
    for reference in REFERENCES:
        check_against_fp64(make(LENGTHS, vocabulary, dtype, reference=reference), "cpu", **options)


@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 1], [63]], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 50304])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_tiny_inputs_match_the_oracle(backend, vocabulary, lengths):
    for reference in REFERENCES:
        check_against_fp64(make(lengths, vocabulary, torch.float32, reference=reference), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_is_the_derivative(options, backend):
    case = make([2, 0, 3], 4, reference="logits")

    def of_logits(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = ops.logits_log_ratio(**case | {"logits": logits}, **options, backend=backend)
        return result.log_ratio, result.policy_logps, result.token_logps

    assert gradcheck(of_logits, [case["logits"]])
    assert gradcheck(lambda z: ops.token_logps(z, case["targets"], **options, backend=backend), [case["logits"]])


def test_targets_may_be_int32_and_rows_any_distance_apart():
    case = make(LENGTHS, 9, torch.float32, reference="logits")
    whole = ops.logits_log_ratio(**case)
    for name, distance in (("logits", 13), ("ref_logits", 20)):
        wide = torch.full((sum(LENGTHS), distance), float("nan"))
        wide[:, :9] = case[name].detach()
        case[name] = wide[:, :9]
    case["targets"] = case["targets"].int()
    for one, other in zip(whole[:4], ops.logits_log_ratio(**case)[:4], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_policy_as_its_own_reference_has_ratio_0(backend):
    case = make(LENGTHS, 1000, torch.float32)
    result = ops.logits_log_ratio(**case, ref_logits=case["logits"], backend=backend)
    assert not result.log_ratio.any() and result.policy_logps.any()
    assert not result.ref_logps.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_added_to_a_row_changes_nothing(backend):
    case = make(LENGTHS, 100, torch.float32)
    case["logits"] = (case["logits"].detach() * 64).round() / 64  # such that fp32 holds the sums
    moved = case["logits"] + torch.tensor([-512.0, 64, 1024]).repeat(6)[: sum(LENGTHS), None]
    one, other = (ops.token_logps(z, case["targets"], backend=backend) for z in (case["logits"], moved))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_of_1024_bf16_tokens_is_within_1e_4_nats(backend):
    case = make([1024], 1000, torch.bfloat16, reference="logits", ignored=False)
    exact = ops.logits_log_ratio(**in_fp64(case), backend="plain")
    result = ops.logits_log_ratio(**case, backend=backend)
    assert abs(result.log_ratio.double() - exact.log_ratio) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_rows(backend):
    case = make([3, 2, 4], 10, torch.float32, reference="logits", ignored=False)
    clean = ops.logits_log_ratio(**case, backend=backend)
    broken = case["logits"].detach().clone()
    broken[3, 4], broken[4, 2] = float("nan"), float("inf")
    case["logits"] = broken.requires_grad_()
    case["targets"][4] = -100  # nothing of a skipped row is ever looked at
    result = ops.logits_log_ratio(**case, backend=backend)
    for one, other in zip(clean[:3], result[:3], strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert result.log_ratio[1].isnan() and result.ref_logps[1].isfinite()
    [gradient] = torch.autograd.grad(combined(result), case["logits"])
    assert gradient[[0, 1, 2, 5, 6, 7, 8]].isfinite().all() and not gradient[4].any()
    upstream = torch.tensor([1.0, 0, 0])  # nor of a sequence that the loss leaves alone, except by the oracle
    if backend != "plain":
        [gradient] = torch.autograd.grad(ops.logits_log_ratio(**case).log_ratio, case["logits"], upstream)
        assert gradient.isfinite().all() and not gradient[3:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity_have_no_probability(backend):
    case = make([4], 6, torch.float32, ignored=False)
    masked = case["logits"].detach().clone()
    masked[:, 5], case["targets"] = float("-inf"), torch.tensor([0, 1, 2, 5])
    masked.requires_grad_()
    logps = ops.token_logps(masked, case["targets"], backend=backend)
    torch.testing.assert_close(logps[:3], masked[:3, :5].log_softmax(1).diagonal())
    assert logps[3] == float("-inf")
    [gradient] = torch.autograd.grad(logps[:3].sum(), masked)
    assert gradient.isfinite().all() and not gradient[:3, 5].any()


# ---------------------------------------------------------------- gradients in place, and little memory


def test_inplace_backward_writes_the_same_gradient_over_the_logits():
    case = make(LENGTHS, 7, torch.bfloat16, reference="logits")
    [expected] = torch.autograd.grad(combined(ops.logits_log_ratio(**case)), case["logits"])
    logits = case["logits"] * 1
    places = []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    loss = combined(ops.logits_log_ratio(**case | {"logits": logits}, inplace_backward=True))
    loss.backward(retain_graph=True)
    assert torch.equal(case["logits"].grad, expected)
    assert places == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="inplace_backward=True: the first backward wrote over the logits"):
        loss.backward()


def test_inplace_backward_never_falsifies_another_gradient_in_silence():
    logits = make([3], 7, torch.float32)["logits"] * 1
    loss = logits.square().sum() + ops.token_logps(logits, torch.tensor([1, 2, 3]), inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class NewTensors(TorchDispatchMode):
    """Record the largest tensor that the block makes. Operations in place return the tensor that was there."""

    def __init__(self, there: torch.Tensor) -> None:
        super().__init__()
        self.there, self.largest = there.data_ptr(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != self.there:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.skipif(native.cpu is None, reason="irlfast._cpu is not built here")
def test_native_code_makes_no_tensor_of_logits_at_all():
    logits, targets = torch.randn(100, 1000, dtype=torch.bfloat16), torch.randint(1000, (100,))
    with NewTensors(logits) as made:
        _, lse, _ = cpu_rows.token_logps(logits, targets, None, 0.5, 30.0)
        cpu_rows.write_gradient(logits, logits, targets, lse, torch.randn(100), 0.5, 30.0)
    assert made.largest == 100


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cpu_makes_no_tensor_beyond_a_chunk(softcap, monkeypatch):
    monkeypatch.setattr(cpu_rows, "CHUNK_BYTES", 4 * 1000 * 8)
    logits, targets = torch.randn(100, 1000, dtype=torch.bfloat16), torch.randint(1000, (100,))
    with NewTensors(logits) as made:
        cpu_rows.token_logps_by_chunks(logits, targets, 0.5, softcap)
        cpu_rows.write_gradient_by_chunks(logits, logits, targets, torch.randn(100), 0.5, softcap)
    assert made.largest == 8 * 1000


# ---------------------------------------------------------------- errors

ERRORS = {
    "logits are a list": ({"logits": [[0.0]]}, r"logits: found list, expected \[N, V\] float32 or bfloat16"),
    "logits of 3 dimensions": ({"logits": torch.zeros(1, 5, 7)}, r"logits: found \[1, 5, 7\] float32 on cpu"),
    "logits are integers": ({"logits": torch.zeros(5, 7).long()}, "logits: found .*int64"),
    "no vocabulary": ({"logits": torch.zeros(5, 0)}, r"logits: found \[5, 0\].*V > 0"),
    "elements apart": (
        {"logits": torch.zeros(7, 5).T, "inplace_backward": True},
        r"logits: found .strides \(1, 5\).*expected adjacent elements .* where inplace_backward",
    ),
    "rows overlap": (
        {"logits": torch.zeros(1, 7).expand(5, 7), "inplace_backward": True},
        r"logits: found 'strides \(0, 1\)', expected rows at least 7 apart where inplace_backward",
    ),
    "targets of another length": ({"targets": torch.zeros(4).long()}, r"targets: found \[4\].*expected \[5\]"),
    "targets are floats": ({"targets": torch.zeros(5)}, "targets: found .*float32.*int64 or int32"),
    "target beyond V": ({"targets": torch.tensor([0, 7, 0, 0, 0])}, "targets: found 7, expected 0 <= value < 7"),
    "target below 0": ({"targets": torch.tensor([0, -1, 0, 0, 0])}, "targets: found -1.* or -100 where skipped"),
    "cu_seqlens int64": ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: found .*int64.*expected .*int32"),
    "cu_seqlens empty": ({"cu_seqlens": torch.tensor([]).int()}, "cu_seqlens: found .*at least the 0"),
    "cu_seqlens ends early": ({"cu_seqlens": torch.tensor([0, 4]).int()}, r"cu_seqlens\[-1\]: found 4, expected 5"),
    "cu_seqlens falls": ({"cu_seqlens": torch.tensor([0, 4, 3, 5]).int()}, "cu_seqlens: .*step of -1"),
    "two references": (
        {"ref_logits": torch.zeros(5, 7), "ref_logps": torch.zeros(5)},
        r"ref_logps: found \[5\].*None where ref_logits is given",
    ),
    "reference of other shape": ({"ref_logits": torch.zeros(5, 8)}, r"ref_logits: found \[5, 8\].*\[5, 7\], as logits"),
    "ref_logps of other length": ({"ref_logps": torch.zeros(3)}, r"ref_logps: found \[3\].*\[5\] .*or \[2\]"),
    "scale is nan": ({"logit_scale": float("nan")}, "logit_scale: found nan"),
    "softcap is 0": ({"logit_softcap": 0.0}, "logit_softcap: found 0.0, expected None or a number > 0"),
    "unknown backend": (
        {"backend": "gpu"},
        "backend: found 'gpu', expected 'auto', 'plain', 'cpu', 'triton' or 'cuda'",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_names_argument_and_what_was_found_and_expected(arguments, message):
    case = make([2, 3], 7, torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.logits_log_ratio(**case | arguments)
    if not arguments.keys() & {"cu_seqlens", "ref_logits", "ref_logps"}:
        del case["cu_seqlens"]
        with pytest.raises(ValueError, match=message):
            ops.token_logps(**case | arguments)


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    logits, targets = torch.zeros(2, 3), torch.zeros(2).long()
    if not checks.INTERPRETED:
        with pytest.raises(ValueError, match=r"logits: found \[2, 3\].* on cpu, expected a tensor on a GPU"):
            ops.token_logps(logits, targets, backend="triton")
    monkeypatch.setattr(native, "cuda", SimpleNamespace(device="cuda"))
    with pytest.raises(ValueError, match=r"logits: found \[2, 3\].* on cpu, expected a tensor on a GPU, by .*'cuda'"):
        ops.token_logps(logits, targets, backend="cuda")
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="backend 'triton': Triton is not installed"):
        ops.token_logps(logits, targets, backend="triton")
    monkeypatch.setattr(native, "cuda", None)
    with pytest.raises(RuntimeError, match=r"backend 'cuda': irlfast._cuda is not built; pip install .* nvcc"):
        ops.token_logps(logits, targets, backend="cuda")


def test_a_machine_without_triton_imports_and_runs():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from irlfast import ops; from irlfast.ops.common import checks\n"
        "print(checks.HAS_TRITON, ops.token_logps(torch.zeros(1, 2), torch.zeros(1).long()).item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "-0.6931471824645996"], done.stderr
