"""The pair losses: functions of an expert's log-ratio ρ(y) and a synthetic answer's ρ(ỹ), in one table.

Each function returns the loss, and its derivatives, which are written by hand: the pair slab needs them while a pair's
logits are in its buffer. A new loss is a function, an entry of :data:`PAIR_LOSSES`, and an oracle in
``tests/helpers/pair_loss_oracles.py``. In formulas, u = β·(ρ(y) − ρ(ỹ)); a = β·ρ(y) and b = β·ρ(ỹ) are the implicit
rewards; ρ̄ is ρ divided by the answer's number of tokens, and ū = β·(ρ̄(y) − ρ̄(ỹ)).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from irlfast.ops.pair_loss.divergences import power


class PairTerms(NamedTuple):
    """The loss of each pair, and its derivatives by the two log-ratios."""

    loss: Tensor  # [P]
    by_expert: Tensor  # [P] ∂ loss / ∂ ρ(y)
    by_synthetic: Tensor  # [P] ∂ loss / ∂ ρ(ỹ)


class PairLossKind(NamedTuple):
    """An entry of :data:`PAIR_LOSSES`."""

    terms: Callable[..., PairTerms]  # of ρ(y) [P], ρ(ỹ) [P], β, and the ``options``
    formula: str
    source: str
    options: tuple[str, ...] = ()  # arguments of pair_loss that ``terms`` takes after β
    per_token: bool = False  # ``terms`` takes ρ̄ in the place of ρ
    of_margin: bool = False  # ρ(y) and ρ(ỹ) enter by their difference alone; then f-divergences apply
    without_reference: bool = False  # log π_θ takes the place of ρ


def of_margin(loss: Tensor, slope: Tensor, beta: float) -> PairTerms:
    """The terms of a loss of u, from its derivative by u."""
    return PairTerms(loss, beta * slope, -beta * slope)


def sigmoid_slope(x: Tensor) -> Tensor:
    """σ′(x)"""
    return torch.sigmoid(x) * torch.sigmoid(-x)


# ---------------------------------------------------------------- losses of the margin u


def sigmoid(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    u = beta * (expert - synthetic)
    return of_margin(-logsigmoid(u), -torch.sigmoid(-u), beta)


def hinge(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    u = beta * (expert - synthetic)
    return of_margin(torch.relu(1 - u), -(u < 1).to(u.dtype), beta)


def linear(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    u = beta * (expert - synthetic)
    return of_margin(-u, -torch.ones_like(u), beta)


def cdpo(expert: Tensor, synthetic: Tensor, beta: float, label_smoothing: float) -> PairTerms:
    u = beta * (expert - synthetic)
    loss = -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)
    return of_margin(loss, label_smoothing * torch.sigmoid(u) - (1 - label_smoothing) * torch.sigmoid(-u), beta)


def robust(expert: Tensor, synthetic: Tensor, beta: float, label_smoothing: float) -> PairTerms:
    u = beta * (expert - synthetic)
    kept, flipped = (1 - label_smoothing) / (1 - 2 * label_smoothing), label_smoothing / (1 - 2 * label_smoothing)
    loss = flipped * logsigmoid(-u) - kept * logsigmoid(u)
    return of_margin(loss, -kept * torch.sigmoid(-u) - flipped * torch.sigmoid(u), beta)


def exo_pair(expert: Tensor, synthetic: Tensor, beta: float, label_smoothing: float) -> PairTerms:
    u = beta * (expert - synthetic)
    kept, flipped = math.log1p(-label_smoothing), math.log(label_smoothing)
    loss = torch.sigmoid(u) * (logsigmoid(u) - kept) + torch.sigmoid(-u) * (logsigmoid(-u) - flipped)
    return of_margin(loss, sigmoid_slope(u) * (u - kept + flipped), beta)


def discopop(expert: Tensor, synthetic: Tensor, beta: float, discopop_tau: float) -> PairTerms:
    u = beta * (expert - synthetic)
    logistic, share = -logsigmoid(u), torch.sigmoid(-u / discopop_tau)
    exponential = (logsigmoid(u / discopop_tau) - u).exp()  # a product of exp(−u) would be inf · 0
    slope = -torch.sigmoid(-u) * share - logistic * sigmoid_slope(u / discopop_tau) / discopop_tau
    return of_margin(logistic * share + exponential, slope + exponential * (share / discopop_tau - 1), beta)


def ipo(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    gap = expert - synthetic - 1 / (2 * beta)
    return PairTerms(gap**2, 2 * gap, -2 * gap)


def simpo(expert: Tensor, synthetic: Tensor, beta: float, simpo_gamma: float) -> PairTerms:
    u = beta * (expert - synthetic) - simpo_gamma
    return of_margin(-logsigmoid(u), -torch.sigmoid(-u), beta)


# ---------------------------------------------------------------- losses of the two rewards a and b


def nca_pair(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    a, b = beta * expert, beta * synthetic
    loss = -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)
    return PairTerms(loss, beta * (0.5 * torch.sigmoid(a) - torch.sigmoid(-a)), beta * 0.5 * torch.sigmoid(b))


def bco_pair(expert: Tensor, synthetic: Tensor, beta: float, reward_shift: float) -> PairTerms:
    a, b = beta * expert - reward_shift, beta * synthetic - reward_shift
    return PairTerms(-logsigmoid(a) - logsigmoid(-b), -beta * torch.sigmoid(-a), beta * torch.sigmoid(b))


def space(expert: Tensor, synthetic: Tensor, beta: float, reward_shift: float) -> PairTerms:
    a, b, noise = beta * expert - reward_shift, beta * synthetic - reward_shift, math.exp(reward_shift)
    loss = -logsigmoid(a) - noise * logsigmoid(-b)
    return PairTerms(loss, -beta * torch.sigmoid(-a), beta * noise * torch.sigmoid(b))


def iris(expert: Tensor, synthetic: Tensor, beta: float, renyi_alpha: float) -> PairTerms:
    a, b = power(beta * expert, renyi_alpha - 1), power(beta * synthetic, renyi_alpha)
    return PairTerms(b.value - a.value, -beta * a.slope, beta * b.slope)


def kto_pair(expert: Tensor, synthetic: Tensor, beta: float, reward_shift: float) -> PairTerms:
    a, b = beta * expert - reward_shift, beta * synthetic - reward_shift
    return PairTerms(torch.sigmoid(-a) + torch.sigmoid(b), -beta * sigmoid_slope(a), beta * sigmoid_slope(b))


def apo_zero(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    return kto_pair(expert, synthetic, beta, reward_shift=0.0)


def apo_down(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    a, u = beta * expert, beta * (expert - synthetic)
    by_margin = beta * sigmoid_slope(u)
    return PairTerms(torch.sigmoid(a) + torch.sigmoid(-u), beta * sigmoid_slope(a) - by_margin, by_margin)


def sppo_hard(expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    above, below = expert - 1 / (2 * beta), synthetic + 1 / (2 * beta)
    return PairTerms(above**2 + below**2, 2 * above, 2 * below)


PAIR_LOSSES = {
    "sigmoid": PairLossKind(
        sigmoid,
        formula="−log σ(u)",
        source="SPIN, arXiv 2401.01335, eq. 4.7, as in the experiments of IRFT; DPO, arXiv 2305.18290, eq. 7",
        of_margin=True,
    ),
    "hinge": PairLossKind(
        hinge,
        formula="max(0, 1 − u)",
        source="the code of SPIN's authors; SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657",
        of_margin=True,
    ),
    "linear": PairLossKind(
        linear,
        formula="−u",
        source="IRFT, arXiv 2405.17888: the gradient of its maximum-likelihood objective",
        of_margin=True,
    ),
    "cdpo": PairLossKind(
        cdpo,
        formula="−(1 − ε)·log σ(u) − ε·log σ(−u), ε = `label_smoothing`",
        source="conservative DPO: E. Mitchell, A note on DPO with noisy preferences, 2023",
        options=("label_smoothing",),
        of_margin=True,
    ),
    "robust": PairLossKind(
        robust,
        formula="(−(1 − ε)·log σ(u) + ε·log σ(−u)) / (1 − 2ε), ε = `label_smoothing`",
        source="Robust DPO, arXiv 2403.00409",
        options=("label_smoothing",),
        of_margin=True,
    ),
    "exo_pair": PairLossKind(
        exo_pair,
        formula="σ(u)·(log σ(u) − log(1 − ε)) + σ(−u)·(log σ(−u) − log ε), ε = `label_smoothing` > 0",
        source="EXO, arXiv 2402.00856, eq. 16",
        options=("label_smoothing",),
        of_margin=True,
    ),
    "discopop": PairLossKind(
        discopop,
        formula="−(1 − s)·log σ(u) + s·exp(−u), s = σ(u / `discopop_tau`)",
        source="DiscoPOP, arXiv 2406.08414, eq. 5",
        options=("discopop_tau",),
        of_margin=True,
    ),
    "ipo": PairLossKind(
        ipo,
        formula="(ρ̄(y) − ρ̄(ỹ) − 1/(2β))²",
        source="IPO, arXiv 2310.12036, eq. 17, per token as in TRL, whose authors asked IPO's",
        per_token=True,
        of_margin=True,
    ),
    "sigmoid_norm": PairLossKind(
        sigmoid,
        formula="−log σ(ū)",
        source="length-normalised DPO: Tülu 3, arXiv 2411.15124",
        per_token=True,
        of_margin=True,
    ),
    "simpo": PairLossKind(
        simpo,
        formula="−log σ(ū − `simpo_gamma`), log π_θ in the place of ρ",
        source="SimPO, arXiv 2405.14734, eq. 6",
        options=("simpo_gamma",),
        per_token=True,
        without_reference=True,
    ),
    "nca_pair": PairLossKind(
        nca_pair,
        formula="−log σ(a) − ½·log σ(−a) − ½·log σ(−b)",
        source="NCA, arXiv 2402.05369",
    ),
    "bco_pair": PairLossKind(
        bco_pair,
        formula="−log σ(a − δ) − log σ(δ − b), δ = `reward_shift`",
        source="BCO, arXiv 2404.04656, where δ is the rewards' running mean; TRL has δ = 0",
        options=("reward_shift",),
    ),
    "space": PairLossKind(
        space,
        formula="−log σ(a − δ) − μ·log σ(δ − b), μ = exp(δ), δ = `reward_shift`",
        source="SPACE, arXiv 2512.07175: noise contrastive estimation, μ synthetic answers to one expert; β is 1",
        options=("reward_shift",),
    ),
    "iris": PairLossKind(
        iris,
        formula="e_α(b) − e_{α − 1}(a), e_k(x) = (exp(k·x) − 1)/k and e_0(x) = x, α = `renyi_alpha`",
        source="IRIS, arXiv 2604.20933, without the logarithm of each mean, so that each pair has its own loss; β is 1",
        options=("renyi_alpha",),
    ),
    "kto_pair": PairLossKind(
        kto_pair,
        formula="σ(δ − a) + σ(b − δ), δ = `reward_shift`",
        source="KTO, arXiv 2402.01306, on pairs, where δ is β times the divergence from the reference",
        options=("reward_shift",),
    ),
    "apo_zero": PairLossKind(apo_zero, formula="σ(−a) + σ(b)", source="APO, arXiv 2408.06266, eq. 7"),
    "apo_down": PairLossKind(apo_down, formula="σ(a) + σ(−u)", source="APO, arXiv 2408.06266, eq. 8"),
    "sppo_hard": PairLossKind(
        sppo_hard,
        formula="(ρ(y) − 1/(2β))² + (ρ(ỹ) + 1/(2β))²",
        source="SPPO, arXiv 2405.00675, eq. 4.7, where the expert always wins",
    ),
}
