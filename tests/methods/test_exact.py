"""IRFT against closed forms, on the exact test bed: unbiased gradients, a rising margin, KL(π_E ‖ π_θ) → 0."""

import functools
import typing

import pytest
import torch

from irlfast.config.types import PairLossName
from irlfast.data.packing import PromptGroup
from irlfast.losses.pairs import irft_loss
from irlfast.ops.pair_loss.losses import PAIR_LOSSES
from irlfast.sampling.shards import DRAWN
from irlfast.sampling.transformers_sampler import generate_batch
from tests.helpers.exact import ANSWERS, END, LONGEST, PROMPTS, answer_logps, flat_gradient, kl, loss_of, model, scored
from tests.helpers.tiers import first_then_full, full, slow

BETA = 0.7


def irft(loss_type: str | list[str], beta: float = BETA, **options: float):
    return functools.partial(irft_loss, beta=beta, loss_type=loss_type, nll_weight=0.0, **options)


def draw(policy, prompt: list[int], count: int) -> list[int]:
    """Indices into ANSWERS of ``count`` answers by the trainer's sampler."""
    seeds = torch.randint(2**40, (count,)).tolist()
    answers = generate_batch(policy, [prompt] * count, seeds, [END], DRAWN, LONGEST)
    return [ANSWERS.index(answer.ids) for answer in answers]


def expert_gradient(expert, policy, prompt):
    """∇ E_{y ~ π_E} log π_θ(y | x), by enumeration."""
    return flat_gradient(answer_logps(expert, prompt).detach().exp() @ answer_logps(policy, prompt), policy)


def pair_gradients(policy, reference, prompt, pairs):
    """∇ of the linear loss of every pair of ANSWERS' indices, one row each."""
    groups = scored(reference, [PromptGroup(prompt, (ANSWERS[i], ANSWERS[j])) for i, j in pairs])
    return torch.stack([flat_gradient(loss_of(policy, irft("linear"), [pair])[0], policy) for pair in groups])


@pytest.fixture(scope="module")
def bed():
    return model(1), model(2)  # expert, policy


def test_probabilities_of_all_answers_sum_to_one(bed):
    for policy in bed:
        for prompt in PROMPTS:
            assert answer_logps(policy, prompt).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_linear_gradient_is_that_of_the_experts_likelihood_by_enumeration(bed):
    """Σ_y Σ_ỹ π_E(y) π_θ(ỹ) ∇loss(y, ỹ) = −β ∇ E_{π_E} log π_θ(y) (arXiv 2405.17888, lemma 4.1)."""
    expert, policy = bed
    prompt, count = PROMPTS[0], len(ANSWERS)
    pairs = [(i, j) for i in range(count) for j in range(count)]
    with torch.no_grad():
        weights = torch.outer(answer_logps(expert, prompt).exp(), answer_logps(policy, prompt).exp()).flatten()
    expected = weights @ pair_gradients(policy, policy, prompt, pairs)
    exact = -BETA * expert_gradient(expert, policy, prompt)
    assert exact.norm() > 0.1
    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-9)


def test_the_sampler_draws_from_the_policy(bed):
    """Pearson's χ² of 20,000 draws against the enumerated probabilities."""
    _, policy = bed
    torch.manual_seed(0)
    counts = torch.bincount(torch.tensor(draw(policy, PROMPTS[1], 20_000)), minlength=len(ANSWERS)).double()
    expected = 20_000 * answer_logps(policy, PROMPTS[1]).detach().exp()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(ANSWERS) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # beyond four standard deviations


def test_linear_gradient_is_unbiased_with_fresh_samples_and_biased_with_stale_ones(bed):
    expert, policy = bed
    prompt = PROMPTS[0]
    exact = -BETA * expert_gradient(expert, policy, prompt)
    direction = exact / exact.norm()
    # The linear loss of (y, ỹ) is that of (y, a) less that of (ỹ, a), for any answer a: no need to do 20,000 backwards.
    base = pair_gradients(policy, policy, prompt, [(i, 0) for i in range(len(ANSWERS))]) @ direction
    torch.manual_seed(0)
    experts = base[draw(expert, prompt, 20_000)]
    errors = {}
    for name, sampler in (("fresh", policy), ("stale", model(3))):
        along = experts - base[draw(sampler, prompt, 20_000)]
        errors[name] = ((along.mean() - exact.norm()) / (along.std() / len(along) ** 0.5)).item()
    assert abs(errors["fresh"]) < 4  # standard errors
    assert abs(errors["stale"]) > 8


# DiscoPOP's loss falls with a margin that falls below 0: it has two minima, one on each side.
LOSSES = [["sigmoid", "bco_pair"], *(name for name in typing.get_args(PairLossName) if name != "discopop")]


@pytest.mark.parametrize("loss_type", first_then_full(LOSSES), ids=str)
def test_a_step_raises_the_margin_and_lowers_the_loss(bed, loss_type):
    expert, _ = bed
    policy = model(2)
    torch.manual_seed(0)
    experts, synthetic = draw(expert, PROMPTS[0], 64), draw(policy, PROMPTS[0], 64)
    pairs = [
        PromptGroup(PROMPTS[0], (ANSWERS[i], ANSWERS[j])) for i, j in zip(experts, synthetic, strict=True) if i != j
    ]
    pairs = scored(policy, pairs)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-4)
    losses, margins = [], []
    for _ in range(3):
        options = {"label_smoothing": 1e-3} if loss_type == "exo_pair" else {}
        loss, metrics = loss_of(policy, irft(loss_type, **options), pairs)
        losses.append(loss.item())
        margins.append(metrics["rewards/margins"].item() / len(pairs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert margins[0] == pytest.approx(0, abs=1e-12)
    assert margins[0] < margins[1] < margins[2]
    assert losses[0] > losses[1] > losses[2]


OTHERS = [pytest.param(name, 4, marks=tier) for name, tier in (("space", full), ("iris", slow), ("hinge", slow))]


@pytest.mark.parametrize(("loss_type", "inner_steps"), [("sigmoid", 4), ("linear", 1), *OTHERS])
def test_self_play_brings_the_policy_to_the_expert(bed, loss_type, inner_steps):
    """Stages of fresh samples and a few inner steps: KL(π_E ‖ π_θ) falls from nats to hundredths."""
    expert, _ = bed
    policy = model(2)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    before = kl(expert, policy)
    stages = 100
    for stage in range(stages):
        drawn = [(p, *both) for p in PROMPTS for both in zip(draw(expert, p, 128), draw(policy, p, 128), strict=True)]
        kept = [(p, i, j) for p, i, j in drawn if i != j or not PAIR_LOSSES[loss_type].of_margin]
        pairs = scored(policy, [PromptGroup(p, (ANSWERS[i], ANSWERS[j])) for p, i, j in kept])
        for _ in range(inner_steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - stage / stages)
            loss, _ = loss_of(policy, irft(loss_type), pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = kl(expert, policy)
    assert before > 1
    assert after < 0.05
