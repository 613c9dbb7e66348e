"""Implicit rewards of f-DPO (arXiv 2309.16240, Theorem 1): f′(exp ρ) takes the place of ρ, up to a constant.

The names and formulas are those of TRL's ``f_divergence_type``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST = 80.0  # of an exponent, so that fp32 holds the power; beyond it the reward is constant


class Reward(NamedTuple):
    """A reward, without β, and its derivative by ρ."""

    value: Tensor
    slope: Tensor


def reverse_kl(ratio: Tensor, coefficient: float) -> Reward:
    """ρ"""
    return Reward(ratio, torch.ones_like(ratio))


def alpha_divergence(ratio: Tensor, coefficient: float) -> Reward:
    """(exp((α − 1)·ρ) − 1) / (α − 1), which is ρ for α = 1"""
    power = coefficient - 1
    if abs(power) < 1e-6:
        return reverse_kl(ratio, coefficient)
    exponent = (power * ratio).clamp(max=LARGEST)
    return Reward(exponent.expm1() / power, torch.where(power * ratio > LARGEST, 0, exponent.exp()))


def forward_kl(ratio: Tensor, coefficient: float) -> Reward:
    """1 − exp(−ρ)"""
    return alpha_divergence(ratio, 0.0)


def js_divergence(ratio: Tensor, coefficient: float) -> Reward:
    """log 2 + log σ(ρ)"""
    return Reward(math.log(2) + logsigmoid(ratio), torch.sigmoid(-ratio))


F_DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
