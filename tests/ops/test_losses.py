"""The tables of losses: each entry is its oracle, its derivatives are autograd's, and the configuration offers it."""

import itertools
import typing

import pytest
import torch

from irlfast.config.types import PairLossName
from irlfast.ops.pair_loss.divergences import F_DIVERGENCES
from irlfast.ops.pair_loss.losses import PAIR_LOSSES, PairTerms
from irlfast.ops.rewards.losses import REWARD_LOSSES
from tests.helpers.pair_loss_oracles import ALPHA, OPTIONS, PAIR_LOSS_ORACLES, PER_TOKEN, REWARD_ORACLES
from tests.helpers.reward_cases import KINDS, PAIRED

BETAS = [0.1, 1.0, 5.0]
EXTREMES = [0.0, 1e-6, 0.3, 1.0, 7.0, 90.0, 1e3, 1e4]


def log_ratios(dtype: torch.dtype = torch.float64, extreme: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios of pairs whose margins are small, large, and of both signs."""
    if extreme:
        values = [*EXTREMES, *(-x for x in EXTREMES)]
        both = torch.tensor(list(itertools.product(values, values)), dtype=dtype).T
    else:
        random = torch.Generator().manual_seed(0)
        both = torch.randn(2, 200, generator=random, dtype=dtype) * torch.logspace(-2, 0.7, 200)
    expert, synthetic = both
    return expert.requires_grad_(), synthetic.requires_grad_()


def terms_of(loss_type: str, expert: torch.Tensor, synthetic: torch.Tensor, beta: float) -> PairTerms:
    kind = PAIR_LOSSES[loss_type]
    return kind.terms(expert, synthetic, beta, *(OPTIONS[option] for option in kind.options))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_a_pair_loss_is_its_oracle(loss_type, beta):
    expert, synthetic = log_ratios()
    expected = PAIR_LOSS_ORACLES[loss_type](expert, synthetic, beta)
    torch.testing.assert_close(terms_of(loss_type, expert, synthetic, beta).loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1e-3, *BETAS, 100.0])
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_derivatives_of_a_pair_loss_are_those_of_autograd_up_to_log_ratios_of_ten_thousand(loss_type, beta, dtype):
    for extreme in (False, True):
        expert, synthetic = log_ratios(dtype, extreme)
        terms = terms_of(loss_type, expert, synthetic, beta)
        assert all(term.isfinite().all() for term in terms)
        expected = torch.autograd.grad(terms.loss.sum(), (expert, synthetic))
        tolerance = {"rtol": 1e-4, "atol": 1e-6 * beta} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
        for actual, slope in zip(terms[1:], expected, strict=True):
            torch.testing.assert_close(actual.detach(), slope, **tolerance)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_the_reward_of_a_divergence_is_its_oracle(divergence):
    ratio, _ = log_ratios()
    reward = F_DIVERGENCES[divergence](ratio, ALPHA).value
    torch.testing.assert_close(reward, REWARD_ORACLES[divergence](ratio.exp()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_derivatives_of_a_reward_are_those_of_autograd_up_to_log_ratios_of_ten_thousand(divergence, dtype):
    ratio, _ = log_ratios(dtype, extreme=True)
    for alpha in (0.0, ALPHA, 1.0, 2.5):
        reward = F_DIVERGENCES[divergence](ratio, alpha)
        assert all(tensor.isfinite().all() for tensor in reward)
        [expected] = torch.autograd.grad(reward.value.sum(), ratio)
        torch.testing.assert_close(reward.slope.detach(), expected)


def test_terms_and_rewards_compile_with_options_that_vary():
    expert, synthetic = (tensor.detach() for tensor in log_ratios())

    def every(beta: float, options: dict[str, float]) -> list[torch.Tensor]:
        terms = [
            tensor
            for kind in PAIR_LOSSES.values()
            for tensor in kind.terms(expert, synthetic, beta, *(options[option] for option in kind.options))
        ]
        return [*terms, *(tensor for reward in F_DIVERGENCES.values() for tensor in reward(expert, beta))]

    torch.compiler.reset()
    compiled = torch.compile(every, fullgraph=True, backend="eager", dynamic=True)
    for factor in (1.0, 0.5):
        given = 0.3 * factor, {name: value * factor for name, value in OPTIONS.items()}
        assert all(map(torch.equal, compiled(*given), every(*given)))


def test_every_loss_has_an_oracle():
    assert PAIR_LOSS_ORACLES.keys() == PAIR_LOSSES.keys()
    assert {name for name, kind in PAIR_LOSSES.items() if kind.per_token} == PER_TOKEN
    assert REWARD_ORACLES.keys() == F_DIVERGENCES.keys()
    assert {options["kind"] for options in (KINDS | PAIRED).values()} == REWARD_LOSSES.keys()


def test_losses_of_the_margin_depend_on_nothing_else():
    expert, synthetic = log_ratios()
    for loss_type, kind in PAIR_LOSSES.items():
        both = [terms_of(loss_type, expert + shift, synthetic + shift, 0.3).loss for shift in (0.0, 0.7)]
        assert torch.allclose(*both) == (kind.of_margin or loss_type == "simpo"), loss_type


def test_the_configuration_offers_every_pair_loss_that_has_a_reference():
    """The configuration does not import the table: importing torch would make ``--help`` slow."""
    assert typing.get_args(PairLossName) == tuple(n for n, kind in PAIR_LOSSES.items() if not kind.without_reference)
