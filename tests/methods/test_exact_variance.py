"""Bradley-Terry with a learned variance against closed forms: its value, its optimum, what it alone can tell."""

import math
from types import SimpleNamespace

import pytest
import torch

from irlfast.losses.inputs import Normalisers
from irlfast.losses.rewards import GAUSSIAN, reward_loss, variance_loss
from irlfast.ops import Head

ENDS = torch.arange(3, dtype=torch.int32)
TWO_OUTPUTS = Head(torch.eye(2, dtype=torch.float64), None, 1.0, None)
ONE_OUTPUT = Head(torch.tensor([[1.0, 0.0]], dtype=torch.float64), None, 1.0, None)


def pair_loss(kind: str, outputs: torch.Tensor, i: int, j: int, regularization: float) -> torch.Tensor:
    """The trainer's loss where answer i beats answer j; ``outputs`` ``[answers, 2]`` are a mean and a log-variance."""
    batch = SimpleNamespace(rows=torch.tensor([i, j]), cu_seqlens=ENDS)
    options = {"level": "sequence", "alpha": 0.5, "regularization": regularization}
    head = TWO_OUTPUTS if kind == GAUSSIAN else ONE_OUTPUT
    return reward_loss(outputs, head, batch, Normalisers(1, 1), kind=kind, **options)[0]


def fitted(kind: str, wins: torch.Tensor, regularization: float) -> torch.Tensor:
    """The outputs ``[answers, 2]`` that the loss is least at, where i beats j with the weight ``wins[i, j]``."""
    outputs = torch.zeros(len(wins), 2, dtype=torch.float64, requires_grad=True)
    settings = {"tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([outputs], lr=1, max_iter=300, **settings)
    pairs = [(i, j) for i in range(len(wins)) for j in range(len(wins)) if i != j]

    def closure():
        optimizer.zero_grad()
        loss = sum(wins[i, j] * pair_loss(kind, outputs, i, j, regularization) for i, j in pairs)
        loss.backward()
        return loss

    optimizer.step(closure)
    return outputs.detach()


def chances(outputs: torch.Tensor) -> torch.Tensor:
    """The model's probability that answer i beats answer j."""
    mean, spread = outputs[:, 0], outputs[:, 1].exp()
    return torch.sigmoid((mean[:, None] - mean[None]) / ((spread[:, None] + spread[None]) / 2).sqrt())


def test_the_loss_is_that_of_two_gaussian_rewards_with_the_logistic_function_for_the_normal_one():
    outputs = torch.tensor([[1.5, 0.3], [-0.2, -1.1]], dtype=torch.float64)
    variances = [4 / math.pi * math.exp(v) for v in outputs[:, 1].tolist()]
    z = (1.5 + 0.2) / math.sqrt(sum(variances))
    found = pair_loss(GAUSSIAN, outputs, 0, 1, regularization=0.1).item()
    logistic = math.log1p(math.exp(-math.sqrt(8 / math.pi) * z))
    assert found == pytest.approx(logistic + 0.1 * (0.3**2 + 1.1**2), abs=1e-12)
    gaussian = -math.log(0.5 * (1 + math.erf(z / math.sqrt(2))))
    assert logistic == pytest.approx(gaussian, abs=0.02)
    flat = torch.tensor([[1.5, 0.0], [-0.2, 0.0]], dtype=torch.float64)
    bradley_terry = pair_loss("bradley_terry", flat, 0, 1, 0.0).item()
    assert pair_loss(GAUSSIAN, flat, 0, 1, 0.1).item() == pytest.approx(bradley_terry, abs=1e-12)


def test_each_head_has_a_mean_and_a_variance_of_its_own():
    expert, synthetic = torch.randn(2, 5, 6, dtype=torch.float64)
    both = variance_loss(expert, synthetic, 0.1)
    for head in range(3):
        own = variance_loss(expert[:, 2 * head : 2 * head + 2], synthetic[:, 2 * head : 2 * head + 2], 0.1)
        torch.testing.assert_close(both[:, head : head + 1], own)


def test_from_demonstrations_it_learns_the_log_density_ratio_and_no_variance():
    """There Bradley-Terry is right, so that the regularised optimum has v = 0 and r = log(π_E/π) + c(x)."""
    generator = torch.Generator().manual_seed(0)
    expert, policy = torch.randn(2, 5, generator=generator, dtype=torch.float64).softmax(1)
    found, exact = fitted(GAUSSIAN, torch.outer(expert, policy), 0.05), (expert / policy).log()
    assert exact.abs().max() > 0.3
    torch.testing.assert_close(found[:, 0] - found[:, 0].mean(), exact - exact.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 1], torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-5)


def test_it_tells_answers_whose_quality_varies_and_bradley_terry_cannot():
    """Comparisons of five answers with different variances: the loss is least where it has their probabilities."""
    truth = torch.tensor([[1.0, -2.0], [0.5, 2.0], [0.0, -1.0], [-0.5, 1.5], [-1.0, 0.0]], dtype=torch.float64)
    wins = chances(truth)
    assert (chances(fitted(GAUSSIAN, wins, 0.0)) - wins).abs().max() < 1e-3
    means = fitted("bradley_terry", wins, 0.0)
    assert (chances(means) - wins).abs().max() > 0.05
