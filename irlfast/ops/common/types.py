"""What every backend is given, and what all of them share once the log-probabilities of the tokens are known."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # a target that is skipped


class HeadInputs(NamedTuple):
    """Policy or reference: its logits are ``softcap(scale · (hidden @ weightᵀ + bias))``."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class ScoredTokens(NamedTuple):
    """Which tokens are scored, and how."""

    targets: Tensor  # [N] int64, IGNORE where skipped
    rows: Tensor | None  # [N] int64: the hidden row that predicts each target; None where row n predicts target n
    sequence: Tensor  # [N] int64: the sequence that each target belongs to
    sequences: int  # S
    logit_scale: float
    logit_softcap: float | None
    dtype: torch.dtype  # of the logits and the statistics: fp32, or fp64 for fp64 inputs
    buffer_mb: float
    skip_mass: float = 0.0  # what a tile of the vocabulary must weigh to be in the gradient
    ref_logps: Tensor | None = None  # the cached reference, per token [N] or per sequence [S]

    def rows_of(self, tokens: Tensor) -> Tensor:
        return tokens if self.rows is None else self.rows[tokens]

    def zeros(self) -> Tensor:
        """A log-probability ``[N]`` for each target."""
        return torch.zeros(self.targets.shape, dtype=self.dtype, device=self.targets.device)

    def indices(self) -> Tensor:
        """Indices of the targets that are not skipped."""
        return (self.targets != IGNORE).nonzero().flatten()


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The number ``[N]`` of the sequence that each of ``tokens`` belongs to."""
    numbers = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return numbers.repeat_interleave(cu_seqlens.diff(), output_size=tokens)


def default_pairs(sequences: int, device: torch.device) -> Tensor:
    """``[P, 2]``: sequences 2i (expert) and 2i + 1 (synthetic)."""
    return torch.arange(sequences, device=device).view(-1, 2)


class PairLossSpec(NamedTuple):
    """The loss on pairs of sequences, see :func:`irlfast.ops.pair_loss`; those in no common pair are independent."""

    pairs: Tensor  # [P, 2] int64
    beta: float
    loss_type: str
    nll_weight: float
    num_pairs: float | None
    num_tokens: float | None


class LogRatio(NamedTuple):
    """Result of :func:`irlfast.ops.log_ratio`; fp32, or fp64 where ``hidden`` is."""

    log_ratio: Tensor  # [S] ρ = Σ_t log π_θ(y_t) − log π_ref(y_t); policy_logps where there is no reference
    policy_logps: Tensor  # [S]
    ref_logps: Tensor  # [S] zeros where there is no reference
    token_logps: Tensor  # [N] log π_θ(y_t), 0 where the target is skipped


class PairLoss(NamedTuple):
    """Result of :func:`irlfast.ops.pair_loss`; only ``loss`` carries a gradient."""

    loss: Tensor  # []
    log_ratio: Tensor  # [S]
    policy_logps: Tensor  # [S]
    ref_logps: Tensor  # [S]
    nll_loss: Tensor  # [] −Σ log π_θ(y_t) of the experts / num_tokens


def per_sequence(values: Tensor, scored: ScoredTokens) -> Tensor:
    """Sums ``[S]`` of per-token ``values`` ``[N]``, in fp64: a thousand fp32 additions near 3,000 nats lose 1e-3."""
    sums = values.new_zeros(scored.sequences, dtype=torch.float64)
    return sums.index_add(0, scored.sequence, values.double())


def summarise(token_logps: Tensor, computed: Tensor | None, scored: ScoredTokens) -> LogRatio:
    """Sequence statistics from token log-probabilities ``[N]`` of the policy and, if computed, of the reference.

    Per token, the difference is taken before the sum: it is small, so that nothing is lost by adding it up.
    """
    ref_logps = scored.ref_logps if computed is None else computed
    policy = per_sequence(token_logps, scored)
    if ref_logps is None:
        reference, ratio = torch.zeros_like(policy), policy
    elif ref_logps.numel() == scored.targets.numel():  # also where N = S: the trainer caches per token
        ref_logps = torch.where(scored.targets == IGNORE, 0, ref_logps.to(token_logps.dtype))
        reference, ratio = per_sequence(ref_logps, scored), per_sequence(token_logps - ref_logps, scored)
    else:
        reference, ratio = ref_logps.double(), policy - ref_logps
    return LogRatio(ratio.to(scored.dtype), policy.to(scored.dtype), reference.to(scored.dtype), token_logps)


def objective(token_logps: Tensor, ref_logps: Tensor | None, scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """The loss ``[]`` from token log-probabilities ``[N]`` of the policy and, if computed, of the reference."""
    statistics = summarise(token_logps, ref_logps, scored)
    loss = pair_losses(margins(statistics, spec), spec.loss_type).sum() / divisor(spec)
    if spec.nll_weight:
        loss = loss + spec.nll_weight * expert_nll(statistics.policy_logps, scored, spec)
    return loss


def derivative(token_logps: Tensor, ref_logps: Tensor | None, scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """∂ objective / ∂ token_logps ``[N]``; that of a sequence needs the log-probabilities of its group only."""
    u = margins(summarise(token_logps, ref_logps, scored), spec)
    slope = pair_slopes(u, spec.loss_type) * (spec.beta / divisor(spec))
    slopes = torch.stack([slope, -slope], 1).flatten()
    by_sequence = slopes.new_zeros(scored.sequences).index_add(0, spec.pairs.flatten(), slopes)
    if spec.nll_weight:
        share = spec.nll_weight / expert_tokens(scored, spec)
        by_sequence -= torch.where(experts(scored, spec), share, 0)
    return by_sequence[scored.sequence]


def margins(statistics: LogRatio, spec: PairLossSpec) -> Tensor:
    """u ``[P]`` = β · (ρ(expert) − ρ(synthetic))."""
    expert, synthetic = statistics.log_ratio[spec.pairs].unbind(1)
    return spec.beta * (expert - synthetic)


def divisor(spec: PairLossSpec) -> float:
    return spec.num_pairs or max(spec.pairs.shape[0], 1)


def pair_losses(u: Tensor, loss_type: str) -> Tensor:
    if loss_type == "sigmoid":
        return -torch.nn.functional.logsigmoid(u)
    return torch.relu(1 - u) if loss_type == "hinge" else -u


def pair_slopes(u: Tensor, loss_type: str) -> Tensor:
    """The derivative of each of ``pair_losses``."""
    if loss_type == "sigmoid":
        return -torch.sigmoid(-u)
    return -(u < 1).to(u.dtype) if loss_type == "hinge" else -torch.ones_like(u)


def expert_nll(policy_logps: Tensor, scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """Mean −log π_θ(y_t) over the experts' tokens, each distinct expert once."""
    # where, not a product: the log-probability of a synthetic answer may be NaN
    total = -torch.where(experts(scored, spec), policy_logps, 0).sum()
    return total / expert_tokens(scored, spec)


def experts(scored: ScoredTokens, spec: PairLossSpec) -> Tensor:
    """Which sequences ``[S]`` are the expert of a pair."""
    none = torch.zeros(scored.sequences, dtype=torch.bool, device=scored.targets.device)
    return none.index_fill(0, spec.pairs[:, 0], True)


def expert_tokens(scored: ScoredTokens, spec: PairLossSpec) -> Tensor | float:
    if spec.num_tokens is not None:
        return spec.num_tokens
    return (experts(scored, spec)[scored.sequence] & (scored.targets != IGNORE)).sum().clamp(min=1)
