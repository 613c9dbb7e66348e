"""Self-play losses against closed forms, on the exact test bed: SPIN, SPACE, IRIS, T-SPIN. β is 1, as in the papers."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.losses.pairs import irft_loss, t_spin_loss
from irlfast.methods.irft import compares
from irlfast.ops.pair_loss.losses import PAIR_LOSSES
from tests.helpers.exact import ANSWERS, PROMPTS, answer_logps, flat_gradient, loss_of, model, scored

GIVEN = {"dataset_name": __file__, "model_name_or_path": "."}
PROMPT = PROMPTS[0]
ALL = list(itertools.product(range(len(ANSWERS)), repeat=2))
ORDERS = [0.0, 0.5, 1.0, 2.0]
SPACES = [{"loss_type": "space", "reward_shift": math.log(mu)} for mu in (1, 3)]
RENYIS = [{"loss_type": "iris", "renyi_alpha": alpha} for alpha in ORDERS]
SELF_PLAY = [{"loss_type": "sigmoid"}, *SPACES, *RENYIS]


@pytest.fixture(scope="module")
def bed():
    return model(1), model(2), model(4)  # expert, reference, policy


@functools.cache
def probabilities(seed: int) -> Tensor:
    """π(answer | prompt) of every answer."""
    return answer_logps(model(seed), PROMPT).detach().exp()


def trainers_expectation(
    policy, reference, expert_probs: Tensor, synthetic_probs: Tensor, identical: bool = True, **options
) -> Tensor:
    """E_y E_ỹ of the trainer's loss on (y, ỹ): all pairs of answers, each with its probability as a weight."""
    weights = torch.outer(expert_probs, synthetic_probs).flatten()
    if not identical:
        weights = weights * torch.tensor([i != j for i, j in ALL])
    pairs = scored(reference, [PromptGroup(PROMPT, (ANSWERS[i], ANSWERS[j])) for i, j in ALL])
    loss = functools.partial(irft_loss, beta=1.0, pair_weights=weights * len(ALL), **options)
    return loss_of(policy, loss, pairs)[0]


def check_same(policy, value: Tensor, expected: Tensor) -> None:
    """The same value and the same gradient, which is not 0."""
    gradient, exact = flat_gradient(value, policy), flat_gradient(expected, policy)
    assert exact.norm() > 0.05
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-9)


def ratio_of(policy) -> Tensor:
    """π_θ / π_ref of every answer, differentiable."""
    return answer_logps(policy, PROMPT).exp() / probabilities(2)


@pytest.mark.parametrize("mu", [1, 3])
def test_space_is_the_likelihood_of_a_classifier_of_one_expert_among_mu_synthetic_answers(bed, mu):
    """arXiv 2512.07175: an answer is real with probability π_θ / (π_θ + μ·π_ref)."""
    _, reference, policy = bed
    p, q, ratio = probabilities(1), probabilities(2), ratio_of(policy)
    expected = -(p @ (ratio / (ratio + mu)).log()) - mu * (q @ (mu / (ratio + mu)).log())
    value = trainers_expectation(policy, reference, p, q, loss_type="space", reward_shift=math.log(mu))
    check_same(policy, value, expected)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2.0])
def test_iris_is_the_bound_of_an_alpha_divergence(bed, alpha):
    _, reference, policy = bed
    p, q, ratio = probabilities(1), probabilities(2), ratio_of(policy)
    expected = (p @ ratio ** (alpha - 1) - 1) / (1 - alpha) + (q @ ratio**alpha - 1) / alpha
    check_same(policy, trainers_expectation(policy, reference, p, q, loss_type="iris", renyi_alpha=alpha), expected)


def test_iris_of_order_1_has_the_gradient_of_sft_and_of_order_2_that_of_least_squares(bed):
    """The KL and the χ² member: −E_expert log π_θ, and half the sum of (π_θ − π_E)² / π_ref; constants aside."""
    _, reference, policy = bed
    p, q, logps = probabilities(1), probabilities(2), answer_logps(policy, PROMPT)
    members = {1.0: -(p @ (logps - q.log())), 2.0: ((logps.exp() - p) ** 2 / q).sum() / 2 - (p**2 / q).sum() / 2 + 0.5}
    for alpha, expected in members.items():
        value = trainers_expectation(policy, reference, p, q, loss_type="iris", renyi_alpha=alpha)
        check_same(policy, value, expected)


@pytest.mark.parametrize("sampler", [1, 2], ids=["the expert itself", "another policy"])
@pytest.mark.parametrize("options", SELF_PLAY, ids=lambda options: " ".join(map(str, options.values())))
def test_the_expert_is_stationary_for_answers_of_any_policy(bed, options, sampler):
    """SPACE, theorems 2 and 3; IRIS, its fixed point; SPIN, theorem 5.2."""
    expert, reference, policy = bed
    reference = expert if sampler == 1 else reference
    value = trainers_expectation(expert, reference, probabilities(1), probabilities(sampler), **options)
    assert flat_gradient(value, expert).norm() < 1e-9
    value = trainers_expectation(policy, reference, probabilities(1), probabilities(sampler), **options)
    assert flat_gradient(value, policy).norm() > 0.05


@pytest.mark.parametrize("options", [SELF_PLAY[0], SPACES[0], RENYIS[1]], ids=lambda options: options["loss_type"])
def test_without_pairs_of_identical_answers_a_loss_of_each_reward_alone_learns_another_policy(bed, options):
    expert, reference, _ = bed
    value = trainers_expectation(expert, reference, probabilities(1), probabilities(2), identical=False, **options)
    unchanged = flat_gradient(value, expert).norm() < 1e-9
    assert unchanged == compares(make_config(GIVEN | options)) == (options["loss_type"] == "sigmoid")


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_iris_has_the_gradient_of_renyis_bound_where_a_stage_begins_and_the_same_optimum(bed, alpha):
    """arXiv 2604.20933 has logarithms of both means, which weigh a batch's answers by softmaxes over the batch."""
    expert, reference, _ = bed
    p, q = probabilities(1), probabilities(2)

    def renyi(policy) -> Tensor:
        ratio = ratio_of(policy)
        return (p @ ratio ** (alpha - 1)).log() / (1 - alpha) + (q @ ratio**alpha).log() / alpha

    first = model(2)
    value = trainers_expectation(first, reference, p, q, loss_type="iris", renyi_alpha=alpha)
    check_same(first, value, renyi(first))
    lowest = renyi(expert)
    assert flat_gradient(lowest, expert).norm() < 1e-9
    divergence = (p**alpha * q ** (1 - alpha)).sum().log() / (alpha - 1)
    torch.testing.assert_close(lowest, -divergence / alpha)


def test_all_self_play_losses_begin_a_stage_in_the_direction_of_irfts_gradient():
    zero = torch.zeros(1, dtype=torch.float64)
    sizes = {("linear",): 1.0, ("sigmoid",): 0.5, ("space", 0.0): 0.5} | {("iris", alpha): 1.0 for alpha in ORDERS}
    for (name, *option), size in sizes.items():
        _, by_expert, by_synthetic = PAIR_LOSSES[name].terms(zero, zero, 1.0, *option)
        assert (by_expert.item(), by_synthetic.item()) == (-size, size), name


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_t_spins_value_and_gradient_are_those_of_its_equation_7(bed, weight):
    _, _, policy = bed
    beta, count = 0.7, 24
    random = torch.Generator().manual_seed(0)
    drawn = [torch.multinomial(probabilities(seed), count, True, generator=random) for seed in (1, 2, 3)]
    y, synthetic, first = (answer_logps(policy, PROMPT)[each] for each in drawn)
    losses = -logsigmoid(beta * (y - synthetic)) - weight * logsigmoid(beta * (synthetic - first))
    answers = [[ANSWERS[i] for i in row] for row in zip(*drawn[: 3 if weight else 2], strict=True)]
    loss = functools.partial(t_spin_loss, beta=beta, historical_weight=weight)
    value, metrics = loss_of(policy, loss, [PromptGroup(PROMPT, tuple(row)) for row in answers])
    check_same(policy, value, losses.mean())
    torch.testing.assert_close(metrics["rewards/margins"], beta * (y - synthetic).sum().detach())
    assert ("logps/first" in metrics) == bool(weight)


def table_slopes(logps: Tensor, expert: Tensor, synthetic: Tensor, beta: float) -> Tensor:
    """The derivatives of E_y E_ỹ of T-SPIN's first term by log π of each answer."""
    count = len(logps)
    terms = PAIR_LOSSES["sigmoid"].terms(logps.repeat_interleave(count), logps.repeat(count), beta)
    weights = torch.outer(expert, synthetic).flatten()
    by_expert, by_synthetic = ((weights * slope).view(count, count) for slope in terms[1:])
    return by_expert.sum(1) + by_synthetic.sum(0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_a_stage_of_t_spin_ends_at_a_power_of_the_experts_ratio_to_the_sampler_not_at_the_expert(beta):
    """So without a historical term π ∝ π_E^(1/(1 + β)) is a fixed point, and π_E is none, unless it is uniform."""
    p, q = probabilities(1), probabilities(2)
    end = ((p / q).log() / beta).log_softmax(0)
    assert table_slopes(end, p, q, beta).abs().max() < 1e-12
    fixed = (p.log() / (1 + beta)).log_softmax(0)
    assert table_slopes(fixed, p, fixed.exp(), beta).abs().max() < 1e-12
    slopes = table_slopes(p.log(), p, p, beta)
    assert slopes[p.argmax()] > 1e-3  # descent lowers the most likely answer


def minimised(weights: Tensor, logps: Tensor) -> Tensor:
    """The log-probabilities with the least sum of weights[i, j]·ℓ(log π(i) − log π(j)), from a start."""
    table = logps.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        log = table.log_softmax(0)
        loss = -(weights * logsigmoid(log[:, None] - log)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return table.detach().log_softmax(0)


def exact_stages(weight: float, stages: int) -> list[float]:
    """KL(π_E ‖ π_t) in nats after each stage of T-SPIN, minimised exactly over a table of all answers."""
    p, first = probabilities(1), probabilities(2)
    logps, distances = first.log(), []
    for stage in range(stages):
        current, historical = torch.outer(p, logps.exp()), torch.outer(logps.exp(), first)
        logps = minimised(current + (weight if stage else 0) * historical, logps)
        distances.append((p * (p.log() - logps)).sum().item())
    return distances


def test_t_spins_exact_stages_alternate_and_its_historical_term_damps_that():
    alone, damped = exact_stages(0.0, 4), exact_stages(0.1, 4)
    assert alone == pytest.approx([0.873, 6.7, 0.871, 6.693], abs=2e-3)  # 6.714 at the start
    assert damped == pytest.approx([0.873, 2.814, 0.324, 2.221], abs=2e-3)
