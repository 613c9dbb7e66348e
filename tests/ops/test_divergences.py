"""discriminator_loss and discriminator_reward: the minimum of each loss, by enumeration; rewards and their limits."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from irlfast import ops
from tests.helpers.ops_cases import sequences
from tests.helpers.reward_cases import FORMS, LENGTHS, POOLINGS, critic, gradients, labels_of, make, options_of

# ---------------------------------------------------------------- the minimum of each loss, by enumeration

EXPERT, POLICY = [1, 2, 5, 4], [6, 3, 2, 1]  # how often each gives the four possible answers


def population(expert: list[int], policy: list[int], pooling: str) -> dict[str, Any]:
    """All answers, as often as they are given. The four have one-hot hidden states, so that the head is h itself."""
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
    """The h with the least loss, by a search from h = 0."""
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
    actual = minimiser(lambda h: ops.discriminator_loss(**inputs, head=h[None], kind="bce").loss)
    p, q = distributions(EXPERT, policy)
    torch.testing.assert_close(actual, (p / q).log() - math.log(times), rtol=0, atol=1e-6)


def test_smoothed_bce_is_least_where_labels_are_wrong_that_often():
    inputs = population(EXPERT, POLICY, "last")
    actual = minimiser(lambda h: ops.discriminator_loss(**inputs, head=h[None], label_smoothing=0.1).loss)
    p, q = distributions(EXPERT, POLICY)
    torch.testing.assert_close(actual.sigmoid(), 0.1 + 0.8 * p / (p + q), rtol=0, atol=1e-6)


def test_bradley_terry_is_least_at_the_log_ratio_up_to_a_constant():
    inputs = population(EXPERT, POLICY, "last")
    experts, synthetics = range(sum(EXPERT)), range(sum(EXPERT), sum(EXPERT) + sum(POLICY))
    pairs = torch.tensor(list(itertools.product(experts, synthetics)))
    loss = lambda h: ops.discriminator_loss(**inputs, head=h[None], kind="bradley_terry", pairs=pairs).loss  # noqa: E731
    p, q = distributions(EXPERT, POLICY)
    actual, best = minimiser(loss), (p / q).log()
    torch.testing.assert_close(actual - actual.mean(), best - best.mean(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- rewards and their limits

H = torch.linspace(-6, 6, 49, dtype=torch.float64)


def test_rewards_are_what_the_papers_say():
    reward = ops.discriminator_reward
    for kind in ("bce", "bradley_terry", "linear", "airl"):
        assert torch.equal(reward(H, kind=kind), H)
    torch.testing.assert_close(reward(H, kind="gail"), -(1 - H.sigmoid()).log())
    torch.testing.assert_close(reward(H, kind="fairl"), H.exp())
    torch.testing.assert_close(reward(H, kind="fairl", f_max=True), -H * H.exp())
    torch.testing.assert_close(reward(H, kind="alpha", alpha=0.3), ((0.7 * H).exp() - 1) / 0.7)


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-5, -1e-5])
@pytest.mark.parametrize(("alpha", "limit"), [(1, H), (0, H.expm1())], ids=["reverse KL", "forward KL"])
def test_alpha_tends_to_reverse_and_forward_kl(alpha, limit, distance):
    actual = ops.discriminator_reward(H, kind="alpha", alpha=alpha + distance)
    torch.testing.assert_close(actual, limit, rtol=0, atol=6**2 * math.exp(6) * abs(distance) + 1e-12)
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
