"""The discriminators of alignment from demonstrations in plain PyTorch: what each logit adds to the loss, and rewards.

A discriminator's logit is h = log D/(1 − D), D the probability that an answer is an expert's. With p_E the experts'
distribution and p_π the policy's, every loss here is least, over all functions h, at h* = log(p_E/p_π) (``bce``: plus
the log of how many experts there are for each synthetic; ``bradley_terry``: plus any constant).

A divergence is D_f(p_E‖p_π) = E_π f(p_E/p_π). Its variational bound (f-GAN, arXiv 1606.00709, eq. 4, with
T = f′(eʰ)) makes the loss −E_E f′(eʰ) + E_π f*(f′(eʰ)), whose least value is −D_f; and f*(f′(eʰ)) is the reward, up to
a constant and the ½ of JS (f-MAX, arXiv 1911.02256). With g(k, h) = (exp(k h) − 1)/k, which is h for k = 0:

| kind | D_f(p_E‖p_π) | loss | reward |
| --- | --- | --- | --- |
| ``alpha`` | (1 − Σ p_E^(1−α) p_π^α)/(α(1−α)) | −E_E g(−α, h) + E_π g(1−α, h) | g(1−α, h) |
| ``airl`` (α = 1) | KL(p_π‖p_E) | E_E (e⁻ʰ − 1) + E_π h | h |
| ``fairl`` (α = 0) | KL(p_E‖p_π) | −E_E h + E_π (eʰ − 1) | eʰ; −h eʰ for ``f_max`` |
| ``gail`` | JS(p_E, p_π) | ½ E_E softplus(−h) + ½ E_π softplus(h) − log 2 | softplus(h) |
| ``bce`` | | mean of softplus(∓h): − for experts, + for synthetics | h |
| ``bradley_terry`` | | mean over pairs of softplus(−(h_expert − h_synthetic)) | h |
"""

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from irlfast.ops.common.checks import FLOATS, require

LOG_2 = 0.6931471805599453
ALPHAS = {"airl": 1.0, "fairl": 0.0}
KINDS = ("bce", "bradley_terry", "airl", "gail", "fairl", "alpha")


class Options(NamedTuple):
    kind: str
    alpha: float
    label_smoothing: float  # the probability that a label, or the order of a pair, is wrong
    f_max: bool
    clamp: float


def discriminator_reward(
    logits: Tensor, *, kind: str, alpha: float = 0.5, f_max: bool = False, clamp: float = 20.0
) -> Tensor:
    """Reward of discriminator logits of any shape, as :func:`discriminator_loss` gives it; differentiable."""
    options = Options(kind, alpha, 0.0, f_max, clamp)
    check_options(options)
    require(isinstance(logits, Tensor) and logits.dtype in FLOATS, "logits", logits, "a tensor of floats")
    return rewards(logits.to(torch.promote_types(logits.dtype, torch.float32)), options)


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


def terms(h: Tensor, expert: Tensor, options: Options) -> Tensor:
    """What each logit adds to the mean over its class, or, for ``bce``, to the mean over all."""
    kind, alpha, smoothing, _, clamp = options
    if kind == "bce":
        return logistic(h, smoothing + (1 - 2 * smoothing) * expert.to(h.dtype))
    if kind == "gail":
        return (logistic(h, expert.to(h.dtype)) - LOG_2) / 2
    alpha = ALPHAS.get(kind, alpha)
    return torch.where(expert, -power(h, -alpha, clamp), power(h, 1 - alpha, clamp))


def rewards(h: Tensor, options: Options) -> Tensor:
    kind, alpha, _, f_max, clamp = options
    if kind == "gail":
        return -logsigmoid(-h)
    if kind == "fairl":
        return (-h if f_max else 1) * exponential(h, clamp)
    return power(h, 1 - alpha, clamp) if kind == "alpha" else h


def item_loss(h: Tensor, expert: Tensor, present: Tensor, options: Options) -> Tensor:
    """Loss of logits ``[I, M]`` of items that are an expert's or not, ``[I]``, without those that are not present."""
    value = terms(h, expert[:, None], options)
    if options.kind == "bce":
        return mean(value, present)
    return mean(value, present & expert) + mean(value, present & ~expert)


def pair_loss(h: Tensor, pairs: Tensor, present: Tensor, options: Options) -> Tensor:
    """Bradley–Terry loss of logits ``[S, M]``, on the pairs ``[P, 2]`` of which both sequences are present."""
    used = present[pairs].all(1)
    expert, synthetic = h[pairs].unbind(1)
    margin = torch.where(used[:, None], expert - synthetic, 0)
    return mean(logistic(margin, 1 - options.label_smoothing), used)


def mean(value: Tensor, used: Tensor) -> Tensor:
    """Mean of ``value`` ``[I, M]`` over the items used and over heads; 0 without items."""
    return torch.where(used[:, None], value, 0).sum() / (used.sum().clamp(min=1) * value.shape[1])


def check_options(options: Options) -> None:
    kind, alpha, smoothing, f_max, clamp = options
    require(kind in KINDS, "kind", kind, " or ".join(map(repr, KINDS)))
    require(isinstance(alpha, Real) and -math.inf < float(alpha) < math.inf, "alpha", alpha, "a number")
    fits = isinstance(smoothing, Real) and 0 <= float(smoothing) < 0.5
    require(fits, "label_smoothing", smoothing, "0 <= label_smoothing < 0.5")
    smooths = kind in ("bce", "bradley_terry") or smoothing == 0
    require(smooths, "label_smoothing", smoothing, f"0 for kind {kind!r}, a bound without labels to smooth")
    require(kind == "fairl" or not f_max, "f_max", f_max, f"False for kind {kind!r}, only 'fairl' has the form")
    require(isinstance(clamp, Real) and 0 < float(clamp) <= 80, "clamp", clamp, "0 < clamp <= 80")
