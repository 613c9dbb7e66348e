"""Each loss of ``PAIR_LOSSES`` as its source has it: functions of the log-ratios ρ(y) and ρ(ỹ), and β.

Losses per token take means per token. The options have the values of :data:`OPTIONS`.
"""

import math
from typing import Any

from torch import Tensor

from irlfast.ops.pair_loss.losses import PAIR_LOSSES

OPTIONS = {"label_smoothing": 0.1, "discopop_tau": 0.5, "simpo_gamma": 0.7, "reward_shift": 0.4, "renyi_alpha": 0.7}
MU = math.exp(0.4)
PER_TOKEN = {"ipo", "sigmoid_norm", "simpo"}


def options_of(loss_type: str) -> dict[str, Any]:
    """The loss type and its options, as arguments of ``pair_loss``."""
    return {"loss_type": loss_type} | {name: OPTIONS[name] for name in PAIR_LOSSES[loss_type].options}


def without_unused_reference(case: dict[str, Any], loss_type: str) -> dict[str, Any]:
    """The arguments of ``pair_loss``, without a reference where the loss refuses one."""
    if not PAIR_LOSSES[loss_type].without_reference:
        return case
    return {name: value for name, value in case.items() if not name.startswith("ref_")}


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def discopop(y: Tensor, s: Tensor, beta: float) -> Tensor:
    u = beta * (y - s)
    share = sigma(u / 0.5)
    return (1 - share) * (1 + (-u).exp()).log() + share * (-u).exp()


def exo_pair(y: Tensor, s: Tensor, beta: float) -> Tensor:
    """The divergence of (σ(u), σ(−u)) from (1 − ε, ε)."""
    first = sigma(beta * (y - s))
    return first * (first / 0.9).log() + (1 - first) * ((1 - first) / 0.1).log()


PAIR_LOSS_ORACLES = {
    "sigmoid": lambda y, s, beta: (1 + (-beta * (y - s)).exp()).log(),
    "hinge": lambda y, s, beta: (1 - beta * (y - s)).clamp(min=0),
    "linear": lambda y, s, beta: -beta * (y - s),
    "cdpo": lambda y, s, beta: -0.9 * sigma(beta * (y - s)).log() - 0.1 * sigma(beta * (s - y)).log(),
    "robust": lambda y, s, beta: (-0.9 * sigma(beta * (y - s)).log() + 0.1 * sigma(beta * (s - y)).log()) / 0.8,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "ipo": lambda y, s, beta: (y - s - 1 / (2 * beta)) ** 2,
    "sigmoid_norm": lambda y, s, beta: (1 + (-beta * (y - s)).exp()).log(),
    "simpo": lambda y, s, beta: (1 + (0.7 - beta * (y - s)).exp()).log(),
    "nca_pair": lambda y, s, beta: -sigma(beta * y).log() - sigma(-beta * y).log() / 2 - sigma(-beta * s).log() / 2,
    "bco_pair": lambda y, s, beta: -sigma(beta * y - 0.4).log() - sigma(0.4 - beta * s).log(),
    "space": lambda y, s, beta: (
        # an answer is real with probability 1 / (1 + μ·exp(−reward)), where μ of 1 + μ answers are not
        (1 + MU * (-beta * y).exp()).log() + MU * (1 + (beta * s).exp() / MU).log()
    ),
    "iris": lambda y, s, beta: ((-0.3 * beta * y).exp() - 1) / 0.3 + ((0.7 * beta * s).exp() - 1) / 0.7,
    "kto_pair": lambda y, s, beta: 1 - sigma(beta * y - 0.4) + 1 - sigma(0.4 - beta * s),
    "apo_zero": lambda y, s, beta: 1 - sigma(beta * y) + sigma(beta * s),
    "apo_down": lambda y, s, beta: sigma(beta * y) + 1 - sigma(beta * (y - s)),
    "sppo_hard": lambda y, s, beta: (y - 1 / (2 * beta)) ** 2 + (s + 1 / (2 * beta)) ** 2,
}

# Each reward of F_DIVERGENCES, with α = 0.3, as f-DPO has it: f′(t), where t is the ratio of probabilities.
ALPHA = 0.3
REWARD_ORACLES = {
    "reverse_kl": lambda t: t.log(),
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: (2 * t / (1 + t)).log(),
    "alpha_divergence": lambda t: (t ** (ALPHA - 1) - 1) / (ALPHA - 1),
}
