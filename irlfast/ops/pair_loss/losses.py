"""The pair losses: functions of an expert's log-ratio ρ(y) and a synthetic answer's ρ(ỹ), in one table.

Each function returns the loss, and its derivatives, which are written by hand: the pair slab needs them while a pair's
logits are in its buffer. A new loss is a function, an entry of :data:`PAIR_LOSSES`, and an oracle in ``tests/ops``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairTerms(NamedTuple):
    """The loss of each pair, and its derivatives by the implicit rewards β·ρ of the two answers."""

    loss: Tensor  # [P]
    by_expert: Tensor  # [P] ∂ loss / ∂ (β·ρ(y))
    by_synthetic: Tensor  # [P] ∂ loss / ∂ (β·ρ(ỹ))


class PairLossKind(NamedTuple):
    """An entry of :data:`PAIR_LOSSES`."""

    terms: Callable[[Tensor, Tensor, float], PairTerms]  # of ρ(y) [P], ρ(ỹ) [P] and β
    formula: str  # with u = β·(ρ(y) − ρ(ỹ))
    paper: str
    used: str  # where the loss is used


def sigmoid(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    """−log σ(u)"""
    u = beta * (expert - synthetic)
    slope = -torch.sigmoid(-u)
    return PairTerms(-logsigmoid(u), slope, -slope)


def hinge(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    """max(0, 1 − u)"""
    u = beta * (expert - synthetic)
    slope = -(u < 1).to(u.dtype)
    return PairTerms(torch.relu(1 - u), slope, -slope)


def linear(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    """−u"""
    u = beta * (expert - synthetic)
    slope = -torch.ones_like(u)
    return PairTerms(-u, slope, -slope)


PAIR_LOSSES = {
    "sigmoid": PairLossKind(
        sigmoid,
        formula="−log σ(u)",
        paper="SPIN, arXiv 2401.01335, eq. 4.7 with the logistic loss; DPO, arXiv 2305.18290, eq. 7",
        used="SPIN, and the experiments of IRFT (arXiv 2405.17888)",
    ),
    "hinge": PairLossKind(
        hinge,
        formula="max(0, 1 − u)",
        paper="SPIN, arXiv 2401.01335, eq. 4.7 with the hinge loss; SLiC, arXiv 2305.10425",
        used="the code that SPIN's authors published",
    ),
    "linear": PairLossKind(
        linear,
        formula="−u",
        paper="IRFT, arXiv 2405.17888: the gradient of its maximum-likelihood objective",
        used="IRFT as its equation reads",
    ),
}
