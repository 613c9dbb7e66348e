"""reward_head and discriminator_loss: the oracle against loops, no leaks between sequences, precision, errors."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from irlfast import ops
from irlfast.ops.common import checks
from irlfast.ops.rewards.checks import check_heads
from tests.helpers.ops_cases import random_pairs, sequences
from tests.helpers.reward_cases import (
    FORMS,
    LENGTHS,
    PAIRED,
    POOLINGS,
    gradients,
    in_fp64,
    labels_of,
    looped_logits,
    looped_loss,
    make,
    options_of,
)

BACKENDS = ["plain", "cpu"]


# ---------------------------------------------------------------- results and gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("name", "pooling"), FORMS)
def test_matches_loops(name, pooling, rows, bias, backend):
    case, options = make(LENGTHS, rows=rows, bias=bias), options_of(name)
    result = ops.discriminator_loss(**case, labels=labels_of(LENGTHS), pooling=pooling, **options, backend=backend)
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert result.loss.item() == pytest.approx(looped_loss(case, pooling, options, pairs), rel=1e-9)
    zero = [[0.0] * len(case["head"])]
    items = [sequence or zero * (pooling == "last") for sequence in looped_logits(case, pooling)]
    expected = torch.tensor(list(itertools.chain(*items)), dtype=torch.float64)
    torch.testing.assert_close(result.logits, expected)
    torch.testing.assert_close(ops.reward_head(**case, pooling=pooling, backend=backend), expected)
    assert result.loss.requires_grad and not result.logits.requires_grad and not result.reward.requires_grad


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_may_share_sequences_and_leave_some_out(backend, name):
    case = make(LENGTHS)
    for seed in range(4):
        pairs = random_pairs(len(LENGTHS), seed, pairs=5)
        result = ops.discriminator_loss(**case, labels=None, **PAIRED[name], pairs=pairs, backend=backend)
        expected = looped_loss(case, "last", PAIRED[name], pairs.tolist())
        assert result.loss.item() == pytest.approx(expected, rel=1e-9)
        assert torch.equal(result.logits, ops.reward_head(**case))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradient_of_the_head_is_the_derivative(pooling, rows):
    case = make([2, 0, 3, 1], size=3, heads=2, rows=rows)

    def logits(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.reward_head(**case | {"hidden": hidden, "head": head, "bias": bias}, pooling=pooling)

    assert gradcheck(logits, [case["hidden"], case["head"], case["bias"]])


@pytest.mark.parametrize("clamp", [20.0, 0.5])  # so that some exponentials go on along their tangent
@pytest.mark.parametrize(("name", "pooling"), FORMS)
def test_gradient_of_the_loss_is_the_derivative(name, pooling, clamp):
    case = make([2, 0, 3, 1], size=3, heads=2, rows=False)

    def loss(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        inputs = case | {"hidden": hidden, "head": head, "bias": bias, "labels": labels_of([2, 0, 3, 1])}
        return ops.discriminator_loss(**inputs, pooling=pooling, clamp=clamp, **options_of(name)).loss

    assert gradcheck(loss, [case["hidden"], case["head"], case["bias"]])


def test_the_loss_of_several_heads_is_their_mean():
    case = make(LENGTHS)
    for name, pooling in FORMS:
        inputs = {"labels": labels_of(LENGTHS), "pooling": pooling} | options_of(name)
        one = [case | {"head": case["head"][[m]], "bias": case["bias"][[m]]} for m in range(3)]
        losses = [ops.discriminator_loss(**head, **inputs).loss for head in one]
        torch.testing.assert_close(ops.discriminator_loss(**case, **inputs).loss, torch.stack(losses).mean())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_labels_may_be_of_any_type(dtype):
    case, labels = make(LENGTHS), labels_of(LENGTHS)
    expected = ops.discriminator_loss(**case, labels=labels).loss
    assert torch.equal(ops.discriminator_loss(**case, labels=labels.to(dtype)).loss, expected)


# ---------------------------------------------------------------- sequences do not affect one another


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "pooling"), FORMS)
def test_empty_sequences_have_no_part(name, pooling, backend):
    case, options = make([2, 3, 1, 4]), options_of(name) | {"pooling": pooling, "backend": backend}
    whole = ops.discriminator_loss(**case, labels=labels_of([2, 3, 1, 4]), **options)
    lengths = [2, 3, 0, 0, 1, 4, 0, 0]
    other = ops.discriminator_loss(**case | {"cu_seqlens": sequences(lengths)}, labels=labels_of(lengths), **options)
    torch.testing.assert_close(other.loss, whole.loss)
    if pooling == "last":
        assert not other.logits[[2, 3, 6, 7]].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 0], [0, 1]], ids=str)
def test_empty_and_tiny_inputs_work(lengths, backend):
    for (name, pooling), rows in itertools.product(FORMS, [False, True]):
        case = make(lengths, rows=rows)
        inputs = {"labels": labels_of(lengths), "pooling": pooling, "backend": backend} | options_of(name)
        result = ops.discriminator_loss(**case, **inputs)
        assert all(x.isfinite().all() for x in result)
        assert result.loss == 0 or any(lengths)
        assert all(x.isfinite().all() for x in gradients(result.loss, case).values())
        gradients(ops.reward_head(**case, pooling=pooling, backend=backend).sum(), case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_nan_stays_in_its_sequence(pooling, rows, value):
    case = make([2, 2, 2, 2], rows=False, bias=False)
    if rows:
        case["rows"] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    broken = case["hidden"].detach().clone()
    broken[3] = value  # the last token of the second sequence
    clean = ops.reward_head(**case, pooling=pooling)
    actual = ops.reward_head(**case | {"hidden": broken}, pooling=pooling)
    own = [3] if pooling == "token" else [1]
    others = [n for n in range(len(actual)) if n not in own]
    assert torch.equal(actual[others], clean[others]) and not actual[own].isfinite().any()
    for name, form in FORMS:
        if form == pooling:
            inputs = {"labels": labels_of([2, 2, 2, 2]), "pooling": pooling} | options_of(name)
            case["hidden"] = broken.requires_grad_()
            result = ops.discriminator_loss(**case, **inputs)
            assert result.reward[others].isfinite().all()
            partner = [1] if form == "last" and name in PAIRED else []
            kept = [n for n in range(8) if n not in (3, *partner)]
            assert gradients(result.loss, case)["hidden"][kept].isfinite().all()


def test_a_nan_in_a_row_that_no_token_reads_never_matters():
    case = make([2, 3], rows=True)
    case["rows"] = torch.tensor([0, 1, 1, 0, 1])
    broken = case["hidden"].detach().clone()
    broken[2] = float("nan")
    for pooling in POOLINGS:
        inputs = case | {"hidden": broken.clone().requires_grad_()}
        loss = ops.discriminator_loss(**inputs, labels=torch.tensor([1, 0]), pooling=pooling).loss
        assert all(x.isfinite().all() for x in (loss, *gradients(loss, inputs).values()))


# ---------------------------------------------------------------- precision, compilation, checkpointing


def bf16_logits(case: dict[str, Any], pooling: str) -> torch.Tensor:
    """PyTorch's logits in bf16, rounded to it, as fp32."""
    hidden = case["hidden"] if pooling == "token" else case["hidden"][case["cu_seqlens"][1:] - 1]
    return torch.nn.functional.linear(hidden, case["head"], case["bias"]).float()


def check_bf16(backend: str, pooling: str, device: str) -> None:
    case = make([5, 3, 7, 1, 4, 6], size=96, dtype=torch.bfloat16, rows=False, device=device)
    double, labels = in_fp64(case), labels_of([0] * 6, device)
    exact = ops.discriminator_loss(**double, labels=labels, pooling=pooling, backend="plain")
    ours = ops.discriminator_loss(**case, labels=labels, pooling=pooling, backend=backend)
    theirs = bf16_logits(case, pooling)
    assert ours.logits.dtype == torch.float32
    assert (ours.logits - exact.logits).abs().max() < 1e-5 < (theirs - exact.logits).abs().max()
    targets = labels if pooling == "last" else labels.repeat_interleave(case["cu_seqlens"].diff())
    loss = torch.nn.functional.binary_cross_entropy_with_logits(theirs, targets[:, None].expand(-1, 3).float())
    wanted, actual, peer = (gradients(x, c) for x, c in ((exact.loss, double), (ours.loss, case), (loss, case)))
    for name, gradient in wanted.items():
        assert actual[name].dtype == torch.bfloat16
        errors = [(other[name].double() - gradient).norm() for other in (actual, peer)]
        assert errors[0] < 1.1 * errors[1], name


@pytest.mark.parametrize("pooling", POOLINGS)
def test_bf16_errs_less_than_pytorch_does(pooling):
    check_bf16("cpu", pooling, "cpu")


def check_compiled(backend: str, device: str) -> None:
    def loss(case: dict[str, Any], labels: torch.Tensor, pooling: str, options: dict[str, Any]) -> torch.Tensor:
        result = ops.discriminator_loss(**case, labels=labels, pooling=pooling, backend=backend, **options)
        return result.loss + ops.reward_head(**case, pooling=pooling, backend=backend).square().sum()

    for name, pooling, rows in (
        ("bradley_terry", "last", True),
        ("alpha", "token", False),
        ("gail", "token", True),
        ("bce", "last", False),
    ):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for lengths in ([5, 3, 0, 7, 1, 2, 4, 2], [2, 4, 5, 6]):
            case = make(lengths, dtype=torch.float32, rows=rows, device=device)
            inputs = case, labels_of(lengths, device), pooling, options_of(name)
            with torch._dynamo.config.patch(error_on_recompile=True):
                expected, actual = loss(*inputs), compiled(*inputs)
            torch.testing.assert_close(actual, expected)
            exact, gradient = gradients(expected, case), gradients(actual, case)
            for leaf in exact:
                torch.testing.assert_close(gradient[leaf], exact[leaf])


def test_compiles_as_one_graph_of_any_length():
    check_compiled("cpu", "cpu")


def check_autocast_and_checkpointing(backend: str, device: str) -> None:
    for pooling in POOLINGS:
        case = make(LENGTHS, dtype=torch.float32, rows=False, device=device)
        inputs = {"labels": labels_of(LENGTHS, device), "pooling": pooling, "backend": backend}
        expected = ops.discriminator_loss(**case, **inputs)
        with torch.autocast(device, torch.bfloat16):
            result = ops.discriminator_loss(**case, **inputs)
            assert torch.equal(ops.reward_head(**case, pooling=pooling, backend=backend), expected.logits)
        assert all(torch.equal(one, other) for one, other in zip(expected, result, strict=True))

        def loss(hidden: torch.Tensor, case: dict = case, inputs: dict = inputs) -> torch.Tensor:
            return ops.discriminator_loss(**case | {"hidden": hidden.tanh()}, **inputs).loss

        straight = gradients(loss(case["hidden"]), case)
        again = gradients(checkpoint(loss, case["hidden"], use_reentrant=False), case)
        assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_autocast_changes_nothing_and_activations_may_be_recomputed():
    check_autocast_and_checkpointing("cpu", "cpu")


# ---------------------------------------------------------------- errors

ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden is a list": ({"hidden": [[0.0]]}, r"hidden: found list, expected \[R, H\] float32 or bfloat16"),
    "hidden of 3 dimensions": ({"hidden": torch.zeros(1, 5, 7)}, r"hidden: found \[1, 5, 7\] float32 on cpu"),
    "head of integers": ({"head": torch.zeros(3, 6).long()}, "head: found .*int64.*expected .*float32"),
    "head of another size": ({"head": torch.zeros(3, 5)}, r"head: found \[3, 5\].*\[M, 6\] with M > 0"),
    "no heads": ({"head": torch.zeros(0, 6)}, r"head: found \[0, 6\].*M > 0"),
    "bias of another length": ({"bias": torch.zeros(2)}, r"bias: found \[2\].*expected \[3\], as head"),
    "cu_seqlens int64": ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: found .*int64.*expected .*int32"),
    "cu_seqlens empty": ({"cu_seqlens": torch.tensor([]).int()}, "cu_seqlens: found .*at least the 0"),
    "cu_seqlens starts late": ({"cu_seqlens": torch.tensor([1, 2, 5]).int()}, r"cu_seqlens\[0\]: found 1"),
    "cu_seqlens ends early": ({"cu_seqlens": sequences([2, 2])}, r"cu_seqlens\[-1\]: found 4, expected 5, the rows"),
    "cu_seqlens falls": ({"cu_seqlens": torch.tensor([0, 6, 5]).int()}, "cu_seqlens: .*step of -1"),
    "rows are floats": ({"rows": torch.zeros(5)}, "rows: found .*float32.*int64 or int32"),
    "row beyond R": ({"rows": torch.tensor([0, 1, 2, 3, 5])}, "rows: found 5, expected 0 <= value < 5"),
    "rows of another length": ({"rows": torch.zeros(4).long()}, r"cu_seqlens\[-1\]: found 5, expected 4, the number"),
    "unknown pooling": ({"pooling": "mean"}, "pooling: found 'mean', expected 'last' or 'token'"),
    "unknown backend": ({"backend": "cuda"}, "backend: found 'cuda', expected 'auto', 'plain', 'cpu' or 'triton'"),
    "unknown kind": ({"kind": "wgan"}, "kind: found 'wgan', expected 'bradley_terry', 'linear', 'bce', .* or 'alpha'"),
    "no labels": ({"labels": None}, r"labels: found None, expected a tensor \[S\] for kind 'bce'"),
    "labels of another length": ({"labels": torch.zeros(3)}, r"labels: found \[3\].*expected \[2\]"),
    "label of 2": ({"labels": torch.tensor([1, 2])}, r"labels: found 2, expected 1 \(expert\) or 0 \(synthetic\)"),
    "soft label": ({"labels": torch.tensor([1.0, 0.25])}, "labels: found 0.25"),
    "alpha is nan": ({"kind": "alpha", "alpha": float("nan")}, "alpha: found nan, expected a number"),
    "too much smoothing": ({"label_smoothing": 0.5}, "label_smoothing: found 0.5, expected 0 <= label_smoothing < 0.5"),
    "smoothing a bound": ({"kind": "gail", "label_smoothing": 0.1}, "label_smoothing: found 0.1, expected 0 for kind"),
    "f_max of another kind": ({"kind": "airl", "f_max": True}, "f_max: found True, expected False for kind 'airl'"),
    "regularization is text": (
        {"kind": "linear", "regularization": "0.1"},
        "regularization: found '0.1', expected a number",
    ),
    "clamp of 100": ({"clamp": 100}, "clamp: found 100, expected 0 < clamp <= 80"),
    "clamp of 0": ({"clamp": 0.0}, "clamp: found 0.0"),
    "pairs for bce": ({"pairs": torch.zeros(1, 2).long()}, r"pairs: found \[1, 2\].*None for kind 'bce'"),
    "pairs of tokens": ({"kind": "bradley_terry", "pooling": "token"}, "pooling: found 'token', expected 'last' for"),
    "pairs of 3": ({"kind": "bradley_terry", "pairs": torch.zeros(1, 3).long()}, r"pairs: found \[1, 3\].*\[P, 2\]"),
    "pair beyond S": (
        {"kind": "bradley_terry", "pairs": torch.tensor([[0, 2]])},
        "pairs: found 2, expected 0 <= value",
    ),
    "pair the wrong way": (
        {"kind": "bradley_terry", "pairs": torch.tensor([[1, 0]])},
        "labels: .*1 for the first and 0",
    ),
    "odd sequences": (
        {"kind": "bradley_terry", "cu_seqlens": sequences([1, 1, 3]), "labels": None},
        "cu_seqlens: found '3 sequences', expected an even number",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_names_argument_and_what_was_found_and_expected(arguments, message):
    case = make([2, 3], dtype=torch.float32, rows=False)
    with pytest.raises(ValueError, match=message):
        ops.discriminator_loss(**case | {"labels": torch.tensor([1, 0])} | arguments)
    if arguments.keys() <= {"hidden", "head", "bias", "cu_seqlens", "rows", "pooling", "backend"}:
        with pytest.raises(ValueError, match=message):
            ops.reward_head(**case | arguments)


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    case = make([2, 3], dtype=torch.float32)
    if not checks.INTERPRETED:
        with pytest.raises(ValueError, match=r"hidden: found .* on cpu, expected a tensor on a GPU"):
            ops.reward_head(**case, backend="triton")
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="backend 'triton': Triton is not installed; pip install"):
        ops.reward_head(**case, backend="triton")


def test_a_machine_without_triton_imports_and_runs():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from irlfast import ops\n"
        "cu = torch.tensor([0, 1], dtype=torch.int32)\n"
        "print(ops.reward_head(torch.ones(1, 2), torch.ones(1, 2), cu).item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2.0"], done.stderr


def test_more_heads_than_a_kernel_takes_are_for_plain_pytorch():
    hidden, cu_seqlens = torch.zeros(5, 6), torch.tensor([0, 5], dtype=torch.int32)
    for heads, backend in ((64, "cpu"), (65, "plain")):
        assert check_heads(hidden, torch.zeros(heads, 6), cu_seqlens, None, None, "last", "auto") == backend
