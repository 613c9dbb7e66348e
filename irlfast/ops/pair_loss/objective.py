"""The loss of a batch of pairs, and its derivatives, from the log-probabilities of tokens."""

import torch
from torch import Tensor

from irlfast.ops.common.sequences import log_ratios
from irlfast.ops.common.types import IGNORE, LogRatio, PairLoss, PairLossSpec, ScoredTokens
from irlfast.ops.pair_loss.losses import PAIR_LOSSES, PairTerms


def objective(
    token_logps: Tensor,  # [N] the policy's
    ref_logps: Tensor | None,  # [N] or [S]
    scored: ScoredTokens,
    spec: PairLossSpec,
) -> PairLoss:
    """Σ over pairs / ``num_pairs`` + ``nll_weight`` · ``nll_loss``, and the statistics; all may carry gradients."""
    statistics = statistics_of(token_logps, ref_logps, scored)
    loss = pair_terms(statistics, spec).loss.sum() / divisor(spec)
    # where, not a product: the log-probability of a synthetic answer may be NaN
    expert_logps = torch.where(is_expert(scored, spec), statistics.policy_logps, 0)
    nll = -expert_logps.sum() / expert_tokens(scored, spec)
    if spec.nll_weight:
        loss = loss + spec.nll_weight * nll
    return PairLoss(loss, statistics.log_ratio, statistics.policy_logps, statistics.ref_logps, nll)


def derivatives(token_logps: Tensor, ref_logps: Tensor | None, scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """∂ objective / ∂ token_logps ``[N]``. A sequence's needs the log-probabilities of the pairs that it is in only."""
    terms = pair_terms(statistics_of(token_logps, ref_logps, scored), spec)
    slopes = torch.stack([terms.by_expert, terms.by_synthetic], 1).flatten() * (spec.beta / divisor(spec))
    by_sequence = slopes.new_zeros(scored.num_sequences).index_add(0, spec.pairs.flatten(), slopes)
    if spec.nll_weight:
        per_token = spec.nll_weight / expert_tokens(scored, spec)
        by_sequence -= is_expert(scored, spec).to(slopes.dtype) * per_token
    return by_sequence[scored.sequence_ids]


def statistics_of(token_logps: Tensor, ref_logps: Tensor | None, scored: ScoredTokens) -> LogRatio:
    return log_ratios(token_logps, ref_logps, scored.targets, scored.sequence_ids, scored.num_sequences)


def pair_terms(statistics: LogRatio, spec: PairLossSpec) -> PairTerms:
    expert, synthetic = statistics.log_ratio[spec.pairs].unbind(1)
    return PAIR_LOSSES[spec.loss_type].terms(expert, synthetic, spec.beta)


def divisor(spec: PairLossSpec) -> float:
    return spec.num_pairs or max(spec.pairs.shape[0], 1)


def is_expert(scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """``[S]`` bool: whether a sequence is the expert of a pair."""
    none = torch.zeros(scored.num_sequences, dtype=torch.bool, device=scored.targets.device)
    return none.index_fill(0, spec.pairs[:, 0], True)


def expert_tokens(scored: ScoredTokens, spec: PairLossSpec) -> Tensor | float:
    """The number that ``nll_loss`` is divided by."""
    if spec.num_tokens is not None:
        return spec.num_tokens
    scored_of_experts = is_expert(scored, spec)[scored.sequence_ids] & (scored.targets != IGNORE)
    return scored_of_experts.sum().clamp(min=1).to(scored.dtype)
