"""The loss of a batch of pairs, and its derivatives, from the log-probabilities of tokens."""

import torch
from torch import Tensor

from irlfast.ops.common.checks import require, values_visible
from irlfast.ops.common.sequences import log_ratios, sequence_log_ratio
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
    pair_losses = mixture(statistics.log_ratio, scored, spec).loss
    loss = weighted(pair_losses, spec).sum() / divisor(spec)
    # where, not a product: the log-probability of a synthetic answer may be NaN
    expert_logps = torch.where(of_expert(scored, spec), token_logps, 0).double().sum()
    nll = (-expert_logps / expert_tokens(scored, spec)).to(loss.dtype)
    if spec.nll_weight:
        loss = loss + spec.nll_weight * nll
    return PairLoss(loss, *statistics[:3], nll, pair_losses)


def derivatives(token_logps: Tensor, ref_logps: Tensor | None, scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """∂ objective / ∂ token_logps ``[N]``. A sequence's needs the log-probabilities of the pairs that it is in only."""
    ids, sequences = scored.sequence_ids, scored.num_sequences
    ratio = sequence_log_ratio(token_logps, ref_logps, scored.targets, ids, sequences, scored.token_weights)
    terms = mixture(ratio, scored, spec)
    slopes = [weighted(slope, spec) / divisor(spec) for slope in (terms.by_expert, terms.by_synthetic)]
    by_sequence = token_logps.new_zeros(scored.num_sequences)
    by_sequence.index_add_(0, spec.pairs.flatten(), torch.stack(slopes, 1).flatten())
    by_token = by_sequence[scored.sequence_ids]
    if scored.token_weights is not None:
        by_token *= scored.token_weights
    if spec.nll_weight:
        per_token = spec.nll_weight / expert_tokens(scored, spec)
        by_token -= of_expert(scored, spec).to(by_token.dtype) * per_token
    return by_token


def statistics_of(token_logps: Tensor, ref_logps: Tensor | None, scored: ScoredTokens) -> LogRatio:
    targets, ids, weights = scored.targets, scored.sequence_ids, scored.token_weights
    return log_ratios(token_logps, ref_logps, targets, ids, scored.num_sequences, weights)


# ---------------------------------------------------------------- pairs


def mixture(log_ratio: Tensor, scored: ScoredTokens, spec: PairLossSpec) -> PairTerms:
    """The weighted sum of the loss types for each pair, and its derivatives by ρ(y) and ρ(ỹ)."""
    rewards, by_ratio = F_DIVERGENCES[spec.f_divergence_type](log_ratio[spec.pairs], spec.f_alpha_divergence_coef)
    loss, slopes = rewards.new_zeros(rewards.shape[0]), torch.zeros_like(rewards)
    for loss_type, weight in zip(spec.loss_types, spec.loss_weights, strict=True):
        share: Tensor | float = 1.0
        if isinstance(loss_type, str):
            kind = PAIR_LOSSES[loss_type]
            if kind.per_token:
                share = 1 / lengths(scored)[spec.pairs]
            options = (getattr(spec, option) for option in kind.options)
            terms = kind.terms(*(rewards * share).unbind(1), spec.beta, *options)
        else:
            terms = differentiated(loss_type, rewards[:, 0], rewards[:, 1], spec.beta)
        loss = loss + weight * terms.loss
        slopes = slopes + weight * share * torch.stack([terms.by_expert, terms.by_synthetic], 1)
    return PairTerms(loss, *(slopes * by_ratio).unbind(1))


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


def weighted(values: Tensor, spec: PairLossSpec) -> Tensor:
    """Values per pair times the pairs' weights."""
    return values if spec.pair_weights is None else values * spec.pair_weights


def divisor(spec: PairLossSpec) -> float:
    return spec.num_pairs or max(spec.pairs.shape[0], 1)


# ---------------------------------------------------------------- tokens


def lengths(scored: ScoredTokens) -> Tensor:
    """The number ``[S]`` of scored tokens of each sequence, at least 1."""
    counts = torch.zeros(scored.num_sequences, dtype=scored.dtype, device=scored.targets.device)
    return counts.index_add(0, scored.sequence_ids, (scored.targets != IGNORE).to(scored.dtype)).clamp(min=1)


def of_expert(scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """``[N]`` bool: whether a token belongs to the expert of a pair."""
    none = torch.zeros(scored.num_sequences, dtype=torch.bool, device=scored.targets.device)
    return none.index_fill(0, spec.pairs[:, 0], True)[scored.sequence_ids]


def expert_tokens(scored: ScoredTokens, spec: PairLossSpec) -> Tensor | float:
    """The number that ``nll_loss`` is divided by."""
    if spec.num_tokens is not None:
        return spec.num_tokens
    return (of_expert(scored, spec) & (scored.targets != IGNORE)).sum().clamp(min=1).to(scored.dtype)
