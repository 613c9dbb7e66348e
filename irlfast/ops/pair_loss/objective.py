"""The loss of a batch of pairs, and its derivatives, from the log-probabilities of tokens."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.checks import require, values_visible
from irlfast.ops.common.sequences import known, log_ratios, summed_log_ratio
from irlfast.ops.common.types import IGNORE, LogRatio, PairFunction, PairLoss, PairLossSpec, ScoredTokens
from irlfast.ops.pair_loss.divergences import F_DIVERGENCES
from irlfast.ops.pair_loss.losses import PAIR_LOSSES, PairTerms


def objective(
    token_logps: Tensor,  # [N] the policy's
    ref_logps: Tensor | None,  # [N] or [S]
    scored: ScoredTokens,
    spec: PairLossSpec,
) -> PairLoss:
    """Σ over pairs / ``num_pairs`` + ``nll_weight`` · ``nll_loss``, and the statistics; all may carry gradients."""
    statistics = statistics_of(token_logps, ref_logps, scored)
    pair_losses, _ = mixture(statistics.log_ratio, length_factors(scored, spec), spec)
    weighted = pair_losses if spec.pair_weights is None else pair_losses * spec.pair_weights
    loss = weighted.sum() / divisor(spec)
    # where, not a product: the log-probability of a synthetic answer may be NaN
    expert_logps = torch.where(of_expert(scored, spec), token_logps, 0).double().sum()
    nll = (-expert_logps / expert_tokens(scored, spec)).to(loss.dtype)
    if spec.nll_weight:
        loss = loss + spec.nll_weight * nll
    return PairLoss(loss, *statistics[:3], nll, pair_losses)


class Coupling(NamedTuple):
    """The tokens of a slab, and what the derivatives need beside their log-probabilities: no slab changes it."""

    scored: ScoredTokens  # n tokens
    token_ref_logps: Tensor | None  # [n] the reference per token
    sequence_ref_logps: Tensor | None  # [S] or per sequence
    nll_slopes: Tensor | None  # [n] the derivatives of ``nll_weight`` · ``nll_loss``
    length_factors: Tensor | None  # [P, 2] see :func:`length_factors`


def couplings(
    scored: ScoredTokens,
    ref_logps: Tensor | None,  # [N] or [S]
    spec: PairLossSpec,
    tokens: Tensor,  # indices of the scored tokens, slab by slab
    sizes: Sequence[int],  # the number of tokens of each slab
) -> list[Coupling]:
    """The coupling of each slab."""
    token_ref_logps, nll_slopes = None, None
    if ref_logps is not None and ref_logps.numel() == scored.targets.numel():
        token_ref_logps, ref_logps = known(ref_logps, scored.targets, scored.dtype)[tokens], None
    if spec.nll_weight:
        slope = -spec.nll_weight / expert_tokens(scored, spec)
        nll_slopes = of_expert(scored, spec)[tokens].to(scored.dtype) * slope
    factors = length_factors(scored, spec)
    slabs = zip(scored.only(tokens).split(sizes), split(token_ref_logps, sizes), split(nll_slopes, sizes), strict=True)
    return [Coupling(slab, reference, ref_logps, slopes, factors) for slab, reference, slopes in slabs]


def split(tensor: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if tensor is None else tensor.split(sizes)


def derivatives(token_logps: Tensor, coupling: Coupling, spec: PairLossSpec) -> Tensor:
    """∂ objective / ∂ token_logps ``[n]`` for the tokens of a slab, which has both sequences of each of their pairs."""
    scored = coupling.scored
    ids, sequences, weights = scored.sequence_ids, scored.num_sequences, scored.token_weights
    if coupling.token_ref_logps is not None:
        token_logps = token_logps - coupling.token_ref_logps
    ratio = summed_log_ratio(token_logps, coupling.sequence_ref_logps, ids, sequences, weights)
    _, by_pair = mixture(ratio, coupling.length_factors, spec)
    if spec.pair_weights is not None:
        by_pair = by_pair * spec.pair_weights[:, None]
    by_pair = by_pair / divisor(spec)
    by_sequence = ratio.new_zeros(sequences).index_add_(0, spec.pairs.flatten(), by_pair.flatten())
    by_token = by_sequence[ids]
    if weights is not None:
        by_token *= weights
    if coupling.nll_slopes is not None:
        by_token += coupling.nll_slopes
    return by_token


def statistics_of(token_logps: Tensor, ref_logps: Tensor | None, scored: ScoredTokens) -> LogRatio:
    targets, ids, weights = scored.targets, scored.sequence_ids, scored.token_weights
    return log_ratios(token_logps, ref_logps, targets, ids, scored.num_sequences, weights)


# ---------------------------------------------------------------- pairs


def mixture(log_ratio: Tensor, factors: Tensor | None, spec: PairLossSpec) -> tuple[Tensor, Tensor]:
    """The weighted sum of the loss types for each pair ``[P]``, and its derivatives ``[P, 2]`` by ρ(y) and ρ(ỹ)."""
    rewards, by_ratio = log_ratio[spec.pairs], None
    if spec.f_divergence_type != "reverse_kl":  # whose reward is ρ
        rewards, by_ratio = F_DIVERGENCES[spec.f_divergence_type](rewards, spec.f_alpha_divergence_coef)
    results = []
    for loss_type, weight in zip(spec.loss_types, spec.loss_weights, strict=True):
        loss, slopes = loss_and_slopes(loss_type, rewards, factors, spec)
        results.append((loss, slopes) if weight == 1 else (weight * loss, weight * slopes))
    losses, slopes = (reduce(torch.add, summands) for summands in zip(*results, strict=True))
    return losses, slopes if by_ratio is None else slopes * by_ratio


def loss_and_slopes(
    loss_type: str | PairFunction,
    rewards: Tensor,  # [P, 2]
    factors: Tensor | None,  # [P, 2] see length_factors
    spec: PairLossSpec,
) -> tuple[Tensor, Tensor]:
    """One loss of each pair ``[P]``, and its derivatives ``[P, 2]`` by the rewards."""
    if not isinstance(loss_type, str):
        loss, *slopes = differentiated(loss_type, rewards[:, 0], rewards[:, 1], spec.beta)
        return loss, torch.stack(slopes, 1)
    kind = PAIR_LOSSES[loss_type]
    options = [getattr(spec, option) for option in kind.options]
    if not kind.per_token:
        factors = None
    loss, *slopes = kind.terms(*(rewards if factors is None else rewards * factors).unbind(1), spec.beta, *options)
    by_reward = torch.stack(slopes, 1)
    return loss, by_reward if factors is None else by_reward * factors


def differentiated(function: PairFunction, expert: Tensor, synthetic: Tensor, beta: float) -> PairTerms:
    """The terms of a function that treats every pair by itself, with derivatives by autograd."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = expert.detach().clone().requires_grad_(), synthetic.detach().clone().requires_grad_()
        total = function(*leaves, beta).sum()
        slopes = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    loss = function(expert, synthetic, beta)
    require(loss.shape == expert.shape, "loss_type(expert, synthetic, beta)", loss, "[{}], as both", *expert.shape)
    check_each_by_itself(function, expert.detach(), synthetic.detach(), beta, loss.detach())
    return PairTerms(loss, *slopes)


def check_each_by_itself(function: PairFunction, expert: Tensor, synthetic: Tensor, beta: float, loss: Tensor) -> None:
    """Check that every second pair's loss stays as it was while the other pairs' log-ratios become 0."""
    if values_visible(loss):
        kept = torch.arange(loss.numel(), dtype=torch.int64, device=loss.device) % 2 == 0
        alone = function(expert.where(kept, 0), synthetic.where(kept, 0), beta)
        same = torch.allclose(alone[kept], loss[kept], equal_nan=True)
        require(same, "loss_type", function, "a function that treats each pair by itself, and always alike")


def divisor(spec: PairLossSpec) -> float:
    return spec.num_pairs or max(spec.pairs.shape[0], 1)


# ---------------------------------------------------------------- tokens


def length_factors(scored: ScoredTokens, spec: PairLossSpec) -> Tensor | None:
    """``[P, 2]``: 1 / the number of scored tokens of each answer, at least 1; None where no loss is per token."""
    if not any(isinstance(name, str) and PAIR_LOSSES[name].per_token for name in spec.loss_types):
        return None
    counts = torch.zeros(scored.num_sequences, dtype=scored.dtype, device=scored.targets.device)
    counts = counts.index_add(0, scored.sequence_ids, (scored.targets != IGNORE).to(scored.dtype))
    return 1 / counts.clamp(min=1)[spec.pairs]


def of_expert(scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """``[N]`` bool: whether a token belongs to the expert of a pair."""
    none = torch.zeros(scored.num_sequences, dtype=torch.bool, device=scored.targets.device)
    return none.index_fill(0, spec.pairs[:, 0], True)[scored.sequence_ids]


def expert_tokens(scored: ScoredTokens, spec: PairLossSpec) -> Tensor | float:
    """The number that ``nll_loss`` is divided by."""
    if spec.num_tokens is not None:
        return spec.num_tokens
    return (of_expert(scored, spec) & (scored.targets != IGNORE)).sum().clamp(min=1).to(scored.dtype)
