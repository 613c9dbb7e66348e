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


def power(ratio: Tensor, exponent: float) -> Reward:
    """(exp(k·ρ) − 1) / k, where k is the exponent of exp ρ; ρ for k = 0"""
    if abs(exponent) < 1e-6:
        return Reward(ratio, torch.ones_like(ratio))
    scaled = (exponent * ratio).clamp(max=LARGEST)
    return Reward(scaled.expm1() / exponent, torch.where(exponent * ratio > LARGEST, 0, scaled.exp()))


def reverse_kl(ratio: Tensor, coefficient: float) -> Reward:
    """ρ"""
    return power(ratio, 0.0)


def alpha_divergence(ratio: Tensor, coefficient: float) -> Reward:
    """(exp((α − 1)·ρ) − 1) / (α − 1), which is ρ for α = 1"""
    return power(ratio, coefficient - 1)


def forward_kl(ratio: Tensor, coefficient: float) -> Reward:
    """1 − exp(−ρ)"""
    return power(ratio, -1.0)


def js_divergence(ratio: Tensor, coefficient: float) -> Reward:
    """log 2 + log σ(ρ)"""
    return Reward(math.log(2) + logsigmoid(ratio), torch.sigmoid(-ratio))


F_DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
