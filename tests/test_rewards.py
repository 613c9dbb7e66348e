"""reward_head and discriminator_loss: the oracle against loops; by enumeration, what minimises each loss; rewards."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from irlfast.ops import checks
from irlfast.ops import rewards as ops
from tests.ops_cases import random_pairs, sequences

BACKENDS = ["plain", "cpu"]
LENGTHS = [5, 3, 0, 7, 1, 0, 4, 6]
POOLINGS = ["last", "token"]
KINDS: dict[str, dict[str, Any]] = {
    "bce": {"kind": "bce"},
    "smoothed": {"kind": "bce", "label_smoothing": 0.1},
    "airl": {"kind": "airl"},
    "gail": {"kind": "gail"},
    "fairl": {"kind": "fairl"},
    "f-max": {"kind": "fairl", "f_max": True},
    "alpha": {"kind": "alpha", "alpha": 0.3},
    "alpha 2": {"kind": "alpha", "alpha": 2.0},
    "alpha near 1": {"kind": "alpha", "alpha": 1 - 1e-4},
}
PAIRED: dict[str, dict[str, Any]] = {
    "bradley_terry": {"kind": "bradley_terry"},
    "bradley_terry smoothed": {"kind": "bradley_terry", "label_smoothing": 0.2},
}
FORMS = [*itertools.product(KINDS, POOLINGS), *itertools.product(PAIRED, ["last"])]  # every kind as it may be pooled


def options_of(name: str) -> dict[str, Any]:
    return (KINDS | PAIRED)[name]


def make(
    lengths: list[int],
    *,
    size: int = 6,
    heads: int = 3,
    dtype: torch.dtype = torch.float64,
    rows: bool = True,
    bias: bool = True,
    largest: float = 4.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of ``reward_head``; the largest logit is about ``largest``. Where rows are given, some are shared."""
    random = torch.Generator().manual_seed(len(lengths))
    tokens = sum(lengths)
    height = max(1, tokens // 2) + 1 if rows else tokens
    hidden, head = torch.randn(height, size, generator=random), torch.randn(heads, size, generator=random)
    head *= largest / max(1e-3, (hidden @ head.T).abs().max().item() if height else 1)
    case = {
        "hidden": hidden.to(dtype),
        "head": head.to(dtype),
        "bias": torch.randn(heads, generator=random).to(dtype) if bias else None,
        "cu_seqlens": sequences(lengths),
        "rows": torch.randint(height, (tokens,), generator=random) if rows else None,
    }
    case = {name: None if value is None else value.to(device) for name, value in case.items()}
    for name in ("hidden", "head", "bias"):
        if case[name] is not None:
            case[name].requires_grad_()
    return case


def labels_of(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return (torch.arange(len(lengths), device=device) + 1) % 2


def in_fp64(case: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_() if value is not None and value.is_floating_point() else value
        for name, value in case.items()
    }


def gradients(output: torch.Tensor, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    leaves = {name: case[name] for name in ("hidden", "head", "bias") if case[name] is not None}
    return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values())), strict=True))


# ---------------------------------------------------------------- right, against loops


def looped_logits(case: dict[str, Any], pooling: str) -> list[list[list[float]]]:
    """Of every sequence, of every item that it has, of every head."""
    result: list[list[list[float]]] = []
    for start, end in itertools.pairwise(case["cu_seqlens"].tolist()):
        result.append([])
        for n in range(start, end) if pooling == "token" else range(max(start, end - 1), end):
            x = case["hidden"][n if case["rows"] is None else case["rows"][n]]
            bias = [0.0] * len(case["head"]) if case["bias"] is None else case["bias"].tolist()
            result[-1].append([(x @ w).item() + b for w, b in zip(case["head"], bias, strict=True)])
    return result


def critic(kind: str, alpha: float = 0.5, **_: Any) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """f-GAN's T = f′(eʰ) and conjugate f*, from the generator f of the divergence."""
    if kind == "airl":  # f(u) = −log u
        return lambda h: -math.exp(-h), lambda t: -1 - math.log(-t)
    if kind == "fairl":  # f(u) = u log u
        return lambda h: 1 + h, lambda t: math.exp(t - 1)
    if kind == "gail":  # f(u) = ½ (u log u − (1 + u) log((1 + u)/2))
        return lambda h: 0.5 * math.log(2 / (1 + math.exp(-h))), lambda t: -0.5 * math.log(2 - math.exp(2 * t))
    # f″(u) = u^(−1−α), f(1) = f′(1) = 0
    return (
        lambda h: (1 - math.exp(-alpha * h)) / alpha,
        lambda t: ((1 - alpha * t) ** ((alpha - 1) / alpha) - 1) / (1 - alpha),
    )


def log_sigmoid(z: float) -> float:
    return -math.log(1 + math.exp(-z))


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def looped_loss(case: dict[str, Any], pooling: str, options: dict[str, Any], pairs: list[list[int]]) -> float:
    found, kind, wrong = looped_logits(case, pooling), options["kind"], options.get("label_smoothing", 0.0)
    losses = []
    for m in range(len(case["head"])):
        logits = [[item[m] for item in sequence] for sequence in found]
        expert, synthetic = (list(itertools.chain(*logits[first::2])) for first in (0, 1))
        if kind == "bradley_terry":
            margins = [logits[e][0] - logits[s][0] for e, s in pairs if logits[e] and logits[s]]
            losses.append(mean([-(1 - wrong) * log_sigmoid(u) - wrong * log_sigmoid(-u) for u in margins]))
        elif kind == "bce":
            right = expert + [-h for h in synthetic]
            losses.append(mean([-(1 - wrong) * log_sigmoid(z) - wrong * log_sigmoid(-z) for z in right]))
        else:
            witness, conjugate = critic(**options)
            losses.append(-mean([witness(h) for h in expert]) + mean([conjugate(witness(h)) for h in synthetic]))
    return mean(losses)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_may_share_sequences_and_leave_some_out(backend):
    case = make(LENGTHS)
    for seed in range(4):
        pairs = random_pairs(len(LENGTHS), seed, pairs=5)
        result = ops.discriminator_loss(**case, labels=None, kind="bradley_terry", pairs=pairs, backend=backend)
        expected = looped_loss(case, "last", PAIRED["bradley_terry"], pairs.tolist())
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


# ---------------------------------------------------------------- what the losses are for, by enumeration

EXPERT, POLICY = [1, 2, 5, 4], [6, 3, 2, 1]  # of how many answers, of four that there are, each is which


def population(expert: list[int], policy: list[int], pooling: str) -> dict[str, Any]:
    """All answers as often as they are given; the hidden state of each of four is its own, so that the head is h."""
    answers = [x for counts in (expert, policy) for x, count in enumerate(counts) for _ in range(count)]
    single = pooling == "last"
    return {
        "hidden": torch.eye(4, dtype=torch.float64),
        "rows": torch.tensor(answers),
        "cu_seqlens": sequences([1] * len(answers) if single else [sum(expert), sum(policy)]),
        "labels": torch.tensor([1] * sum(expert) + [0] * sum(policy) if single else [1, 0]),
        "pooling": pooling,
    }


def minimiser(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """From h = 0."""
    h = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [h], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def evaluate() -> torch.Tensor:
        search.zero_grad()
        value = loss(h)
        value.backward()
        return value

    search.step(evaluate)
    return h.detach()


def distributions(expert: list[int], policy: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(counts).double() / sum(counts) for counts in (expert, policy))


def divergence(p: torch.Tensor, q: torch.Tensor, kind: str, alpha: float = 0.5, **_: Any) -> torch.Tensor:
    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum()

    if kind == "gail":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    if kind == "alpha":
        return (1 - (p ** (1 - alpha) * q**alpha).sum()) / (alpha * (1 - alpha))
    return kl(q, p) if kind == "airl" else kl(p, q)


@pytest.mark.parametrize("policy", [POLICY, [2 * x for x in POLICY]], ids=["as many", "twice as many synthetics"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "options",
    [{"kind": kind} for kind in ("airl", "gail", "fairl")] + [{"kind": "alpha", "alpha": a} for a in (-1, 0.5, 2)],
)
def test_bounds_are_least_at_the_log_ratio_where_they_are_the_divergence(options, pooling, policy):
    p, q = distributions(EXPERT, policy)
    inputs = population(EXPERT, policy, pooling) | options

    def loss(h: torch.Tensor) -> torch.Tensor:
        return ops.discriminator_loss(**inputs, head=h[None]).loss

    best = (p / q).log()
    torch.testing.assert_close(minimiser(loss), best, rtol=0, atol=1e-6)
    torch.testing.assert_close(-loss(best), divergence(p, q, **options))
    reward = ops.discriminator_loss(**inputs, head=best[None]).reward
    expected = ops.discriminator_reward(best, **options)[inputs["rows"]][:, None]
    torch.testing.assert_close(reward, expected)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_bce_is_least_at_the_log_ratio_of_frequencies(pooling, times):
    policy = [times * x for x in POLICY]
    inputs = population(EXPERT, policy, pooling)
    found = minimiser(lambda h: ops.discriminator_loss(**inputs, head=h[None], kind="bce").loss)
    p, q = distributions(EXPERT, policy)
    torch.testing.assert_close(found, (p / q).log() - math.log(times), rtol=0, atol=1e-6)


def test_smoothed_bce_is_least_where_labels_are_wrong_that_often():
    inputs = population(EXPERT, POLICY, "last")
    found = minimiser(lambda h: ops.discriminator_loss(**inputs, head=h[None], label_smoothing=0.1).loss)
    p, q = distributions(EXPERT, POLICY)
    torch.testing.assert_close(found.sigmoid(), 0.1 + 0.8 * p / (p + q), rtol=0, atol=1e-6)


def test_bradley_terry_is_least_at_the_log_ratio_up_to_a_constant():
    inputs = population(EXPERT, POLICY, "last")
    experts, synthetics = range(sum(EXPERT)), range(sum(EXPERT), sum(EXPERT) + sum(POLICY))
    pairs = torch.tensor(list(itertools.product(experts, synthetics)))
    loss = lambda h: ops.discriminator_loss(**inputs, head=h[None], kind="bradley_terry", pairs=pairs).loss  # noqa: E731
    p, q = distributions(EXPERT, POLICY)
    found, best = minimiser(loss), (p / q).log()
    torch.testing.assert_close(found - found.mean(), best - best.mean(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- rewards and their limits

H = torch.linspace(-6, 6, 49, dtype=torch.float64)


def test_rewards_are_what_the_papers_say():
    reward = ops.discriminator_reward
    for kind in ("bce", "bradley_terry", "airl"):
        assert torch.equal(reward(H, kind=kind), H)
    torch.testing.assert_close(reward(H, kind="gail"), -(1 - H.sigmoid()).log())
    torch.testing.assert_close(reward(H, kind="fairl"), H.exp())
    torch.testing.assert_close(reward(H, kind="fairl", f_max=True), -H * H.exp())
    torch.testing.assert_close(reward(H, kind="alpha", alpha=0.3), ((0.7 * H).exp() - 1) / 0.7)


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-5, -1e-5])
@pytest.mark.parametrize(("alpha", "limit"), [(1, H), (0, H.expm1())], ids=["reverse KL", "forward KL"])
def test_alpha_tends_to_reverse_and_forward_kl(alpha, limit, distance):
    found = ops.discriminator_reward(H, kind="alpha", alpha=alpha + distance)
    torch.testing.assert_close(found, limit, rtol=0, atol=6**2 * math.exp(6) * abs(distance) + 1e-12)
    losses = [
        ops.discriminator_loss(**make(LENGTHS), labels=labels_of(LENGTHS), **options).loss
        for options in ({"kind": "alpha", "alpha": alpha + distance}, {"kind": "airl" if alpha else "fairl"})
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e3 * abs(distance) + 1e-12)


@pytest.mark.parametrize(
    "options", [{"kind": k} for k in ("airl", "gail", "fairl")] + [{"kind": "alpha", "alpha": 0.3}]
)
def test_rewards_are_the_conjugates_up_to_a_constant(options):
    witness, conjugate = critic(**options)
    expected = torch.tensor([conjugate(witness(h)) for h in H.tolist()], dtype=torch.float64)
    apart = ops.discriminator_reward(H, **options) - expected * (2 if options["kind"] == "gail" else 1)  # JS has a ½
    torch.testing.assert_close(apart, apart[:1].expand_as(apart))


@pytest.mark.parametrize("clamp", [20.0, 80.0])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_80_give_finite_losses_rewards_and_gradients(dtype, pooling, clamp):
    case = make(LENGTHS, dtype=dtype, rows=False, bias=False, largest=80.0)
    for name, form in FORMS:
        if form == pooling:
            inputs = {"labels": labels_of(LENGTHS), "pooling": pooling, "clamp": clamp} | options_of(name)
            result = ops.discriminator_loss(**case, **inputs)
            assert all(x.isfinite().all() for x in result), name
            assert all(x.isfinite().all() for x in gradients(result.loss, case).values()), name


def test_beyond_the_clamp_exponentials_go_on_along_their_tangent():
    h = torch.tensor([1.0, 2, 3, 50], dtype=torch.float64, requires_grad=True)
    reward = ops.discriminator_reward(h, kind="fairl", clamp=2)
    top = math.exp(2)
    torch.testing.assert_close(reward.tolist(), [math.e, top, 2 * top, 49 * top])
    assert torch.autograd.grad(reward.sum(), h)[0].tolist() == pytest.approx([math.e, top, top, top])


# ---------------------------------------------------------------- nothing leaks


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
def test_nothing_and_next_to_nothing(lengths, backend):
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
    found = ops.reward_head(**case | {"hidden": broken}, pooling=pooling)
    own = [3] if pooling == "token" else [1]
    others = [n for n in range(len(found)) if n not in own]
    assert torch.equal(found[others], clean[others]) and not found[own].isfinite().any()
    for name, form in FORMS:
        if form == pooling:
            inputs = {"labels": labels_of([2, 2, 2, 2]), "pooling": pooling} | options_of(name)
            case["hidden"] = broken.requires_grad_()
            result = ops.discriminator_loss(**case, **inputs)
            assert result.reward[others].isfinite().all()
            partner = [1] if form == "last" and "bradley" in name else []
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


# ---------------------------------------------------------------- precision, and what torch asks


def bf16_logits(case: dict[str, Any], pooling: str) -> torch.Tensor:
    """What PyTorch gives in bf16: logits rounded to it, statistics in fp32."""
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
    wanted, found, peer = (gradients(x, c) for x, c in ((exact.loss, double), (ours.loss, case), (loss, case)))
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.bfloat16
        errors = [(other[name].double() - gradient).norm() for other in (found, peer)]
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
                expected, found = loss(*inputs), compiled(*inputs)
            torch.testing.assert_close(found, expected)
            exact, gradient = gradients(expected, case), gradients(found, case)
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


# ---------------------------------------------------------------- bad input

ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden is a list": ({"hidden": [[0.0]]}, r"hidden: found list, expected \[R, H\] float32 or bfloat16"),
    "hidden of 3 dimensions": ({"hidden": torch.zeros(1, 5, 7)}, r"hidden: found \[1, 5, 7\] float32 on cpu"),
    "head of another dtype": ({"head": torch.zeros(3, 6).double()}, "head: found .*float64.*expected .*float32"),
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
    "unknown kind": ({"kind": "wgan"}, "kind: found 'wgan', expected 'bce' or 'bradley_terry' or"),
    "no labels": ({"labels": None}, r"labels: found None, expected a tensor \[S\] for kind 'bce'"),
    "labels of another length": ({"labels": torch.zeros(3)}, r"labels: found \[3\].*expected \[2\]"),
    "label of 2": ({"labels": torch.tensor([1, 2])}, r"labels: found 2, expected 1 \(expert\) or 0 \(synthetic\)"),
    "soft label": ({"labels": torch.tensor([1.0, 0.25])}, "labels: found 0.25"),
    "alpha is nan": ({"kind": "alpha", "alpha": float("nan")}, "alpha: found nan, expected a number"),
    "too much smoothing": ({"label_smoothing": 0.5}, "label_smoothing: found 0.5, expected 0 <= label_smoothing < 0.5"),
    "smoothing a bound": ({"kind": "gail", "label_smoothing": 0.1}, "label_smoothing: found 0.1, expected 0 for kind"),
    "f_max of another kind": ({"kind": "airl", "f_max": True}, "f_max: found True, expected False for kind 'airl'"),
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
        "import torch; from irlfast.ops import rewards as ops\n"
        "cu = torch.tensor([0, 1], dtype=torch.int32)\n"
        "print(ops.reward_head(torch.ones(1, 2), torch.ones(1, 2), cu).item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2.0"], done.stderr
