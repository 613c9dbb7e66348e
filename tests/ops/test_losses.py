"""The tables of losses: each entry is its oracle, its derivatives are autograd's, and the configuration offers it."""

import typing

import pytest
import torch

from irlfast.config import Config
from irlfast.ops.pair_loss.losses import PAIR_LOSSES
from irlfast.ops.rewards.losses import REWARD_LOSSES
from tests.helpers.ops_cases import PAIR_LOSS_ORACLES
from tests.helpers.reward_cases import KINDS, PAIRED

BETAS = [0.1, 1.0, 5.0]


def log_ratios() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios of 200 pairs whose margins are small, large, and of both signs."""
    random = torch.Generator().manual_seed(0)
    expert, synthetic = torch.randn(2, 200, generator=random, dtype=torch.float64) * torch.logspace(-2, 1.5, 200)
    return expert.requires_grad_(), synthetic.requires_grad_()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_a_pair_loss_is_its_oracle(loss_type, beta):
    expert, synthetic = log_ratios()
    expected = PAIR_LOSS_ORACLES[loss_type](expert, synthetic, beta)
    torch.testing.assert_close(PAIR_LOSSES[loss_type].terms(expert, synthetic, beta).loss, expected)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_derivatives_of_a_pair_loss_are_those_of_autograd(loss_type, beta):
    expert, synthetic = log_ratios()
    terms = PAIR_LOSSES[loss_type].terms(expert, synthetic, beta)
    by_expert, by_synthetic = torch.autograd.grad(terms.loss.sum(), (expert, synthetic))
    torch.testing.assert_close(beta * terms.by_expert, by_expert)
    torch.testing.assert_close(beta * terms.by_synthetic, by_synthetic)


def test_every_loss_has_an_oracle():
    assert PAIR_LOSS_ORACLES.keys() == PAIR_LOSSES.keys()
    assert {options["kind"] for options in (KINDS | PAIRED).values()} == REWARD_LOSSES.keys()


def test_the_configuration_offers_every_pair_loss():
    """The configuration does not import the table: importing torch would make ``--help`` slow."""
    assert set(typing.get_args(typing.get_type_hints(Config)["loss_type"])) == PAIR_LOSSES.keys()
