"""The losses of reward heads in plain PyTorch, and the reward that each gives, in one table.

A discriminator's logit is h = log D/(1 − D), D being the probability that an answer is an expert's. With p_E the
experts' distribution and p_π the policy's, every loss but ``linear`` is least, over all functions h, at
h* = log(p_E/p_π). For ``bce``, h* also has the log of the number of experts per synthetic; for ``bradley_terry``, any
constant.

A divergence is D_f(p_E‖p_π) = E_π f(p_E/p_π). Its variational bound (f-GAN, arXiv 1606.00709, eq. 4, with
T = f′(eʰ)) makes the loss −E_E f′(eʰ) + E_π f*(f′(eʰ)), whose least value is −D_f. The reward is f*(f′(eʰ)), up to a
constant and the ½ of JS (f-MAX, arXiv 1911.02256). With g(k, h) = (exp(k h) − 1)/k, which is h for k = 0:

| kind | D_f(p_E‖p_π) | loss | reward |
| --- | --- | --- | --- |
| ``bradley_terry`` | | mean over pairs of softplus(−(h_E − h_π)) | h |
| ``linear`` | | mean over pairs of −(h_E − h_π) + λ·(h_E² + h_π²) | h |
| ``bce`` | | mean of softplus(∓h): − for experts, + for synthetics | h |
| ``airl`` (α = 1) | KL(p_π‖p_E) | E_E (e⁻ʰ − 1) + E_π h | h |
| ``gail`` | JS(p_E, p_π) | ½ E_E softplus(−h) + ½ E_π softplus(h) − log 2 | softplus(h) |
| ``fairl`` (α = 0) | KL(p_E‖p_π) | −E_E h + E_π (eʰ − 1) | eʰ; −h eʰ for ``f_max`` |
| ``alpha`` | (1 − Σ p_E^(1−α) p_π^α)/(α(1−α)) | −E_E g(−α, h) + E_π g(1−α, h) | g(1−α, h) |

A new loss is a function, an entry of :data:`REWARD_LOSSES`, and an oracle in ``tests/helpers/reward_cases.py``. Where
``kernels/rewards.py`` has no formula for it, a GPU takes the logits from the kernel and the loss from here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOG_2 = 0.6931471805599453


class Options(NamedTuple):
    """The arguments of :func:`irlfast.ops.discriminator_loss` that its formulas take."""

    kind: str  # a key of REWARD_LOSSES
    alpha: float = 0.5
    label_smoothing: float = 0.0  # the probability that a label, or the order of a pair, is wrong
    f_max: bool = False
    clamp: float = 20.0
    regularization: float = 0.0


class RewardLossKind(NamedTuple):
    """An entry of :data:`REWARD_LOSSES`."""

    # Over "pairs": of the logits [P, M] of experts and synthetics, and options. Over "classes", which are experts and
    # synthetics, or over "all" items: of logits [I, M], whether they are an expert's [I, 1], and options. An item is a
    # sequence or a token.
    terms: Callable[[Tensor, Tensor, Options], Tensor]
    mean_over: str  # "pairs"; "classes": the two classes' means are added; "all": one mean over all items
    reward: Callable[[Tensor, Options], Tensor]  # of logits of any shape, and options
    paper: str


# ---------------------------------------------------------------- functions that several losses share


def logistic(z: Tensor, y: Tensor | float) -> Tensor:
    """``y · softplus(−z) + (1 − y) · softplus(z)``"""
    return -(y * logsigmoid(z) + (1 - y) * logsigmoid(-z))


def exponential(z: Tensor, clamp: float) -> Tensor:
    """exp, continued along its tangent beyond ``clamp``."""
    return z.clamp(max=clamp).exp() * (1 + (z - clamp).relu())


def power(h: Tensor, k: float, clamp: float) -> Tensor:
    """g(k, h) = (exp(k h) − 1)/k, which is h for k = 0."""
    if k == 0:
        return h
    z = k * h
    inner = z.clamp(max=clamp)
    return (inner.expm1() + inner.exp() * (z - clamp).relu()) / k


def alpha_bound(h: Tensor, expert: Tensor, alpha: float, clamp: float) -> Tensor:
    """−g(−α, h) of experts, g(1−α, h) of synthetics."""
    return torch.where(expert, -power(h, -alpha, clamp), power(h, 1 - alpha, clamp))


def identity(h: Tensor, options: Options) -> Tensor:
    return h


# ---------------------------------------------------------------- losses, and their rewards


def bradley_terry(expert: Tensor, synthetic: Tensor, options: Options) -> Tensor:
    return logistic(expert - synthetic, 1 - options.label_smoothing)


def linear(expert: Tensor, synthetic: Tensor, options: Options) -> Tensor:
    return synthetic - expert + options.regularization * (expert**2 + synthetic**2)


def bce(h: Tensor, expert: Tensor, options: Options) -> Tensor:
    smoothing = options.label_smoothing
    return logistic(h, smoothing + (1 - 2 * smoothing) * expert.to(h.dtype))


def airl(h: Tensor, expert: Tensor, options: Options) -> Tensor:
    return alpha_bound(h, expert, 1.0, options.clamp)


def gail(h: Tensor, expert: Tensor, options: Options) -> Tensor:
    return (logistic(h, expert.to(h.dtype)) - LOG_2) / 2


def gail_reward(h: Tensor, options: Options) -> Tensor:
    return -logsigmoid(-h)


def fairl(h: Tensor, expert: Tensor, options: Options) -> Tensor:
    return alpha_bound(h, expert, 0.0, options.clamp)


def fairl_reward(h: Tensor, options: Options) -> Tensor:
    return (-h if options.f_max else 1) * exponential(h, options.clamp)


def alpha(h: Tensor, expert: Tensor, options: Options) -> Tensor:
    return alpha_bound(h, expert, options.alpha, options.clamp)


def alpha_reward(h: Tensor, options: Options) -> Tensor:
    return power(h, 1 - options.alpha, options.clamp)


REWARD_LOSSES = {
    "bradley_terry": RewardLossKind(bradley_terry, "pairs", identity, "RFT, arXiv 2405.17888, with −log σ"),
    "linear": RewardLossKind(linear, "pairs", identity, "RFT, arXiv 2405.17888, with squared rewards"),
    "bce": RewardLossKind(bce, "all", identity, "Inverse-RLignment; GAN, arXiv 1406.2661, eq. 1"),
    "airl": RewardLossKind(airl, "classes", identity, "AIRL, arXiv 1710.11248; f-GAN, arXiv 1606.00709, eq. 4"),
    "gail": RewardLossKind(gail, "classes", gail_reward, "GAIL, arXiv 1606.03476; f-GAN, arXiv 1606.00709, eq. 4"),
    "fairl": RewardLossKind(fairl, "classes", fairl_reward, "FAIRL, arXiv 1911.02256; f-GAN, arXiv 1606.00709, eq. 4"),
    "alpha": RewardLossKind(alpha, "classes", alpha_reward, "f-GAN, arXiv 1606.00709, eq. 4"),
}
