"""What every backend is given, and what all of them share once the log-probabilities of the tokens are known."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # a target that is skipped


class Side(NamedTuple):
    """Policy or reference: its logits are ``softcap(scale · (hidden @ weightᵀ + bias))``."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class Problem(NamedTuple):
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

    def scored(self) -> Tensor:
        """Indices of the targets that are not skipped."""
        return (self.targets != IGNORE).nonzero().flatten()


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The number ``[N]`` of the sequence that each of ``tokens`` belongs to."""
    numbers = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return numbers.repeat_interleave(cu_seqlens.diff(), output_size=tokens)


def default_pairs(sequences: int, device: torch.device) -> Tensor:
    """``[P, 2]``: sequences 2i (expert) and 2i + 1 (synthetic)."""
    return torch.arange(sequences, device=device).view(-1, 2)


class Coupling(NamedTuple):
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


def per_sequence(values: Tensor, problem: Problem) -> Tensor:
    """Sums ``[S]`` of per-token ``values`` ``[N]``, in fp64: a thousand fp32 additions near 3,000 nats lose 1e-3."""
    sums = values.new_zeros(problem.sequences, dtype=torch.float64)
    return sums.index_add(0, problem.sequence, values.double())


def summarise(token_logps: Tensor, computed: Tensor | None, problem: Problem) -> LogRatio:
    """Sequence statistics from token log-probabilities ``[N]`` of the policy and, if computed, of the reference.

    Per token, the difference is taken before the sum: it is small, so that nothing is lost by adding it up.
    """
    ref_logps = problem.ref_logps if computed is None else computed
    policy = per_sequence(token_logps, problem)
    if ref_logps is None:
        reference, ratio = torch.zeros_like(policy), policy
    elif ref_logps.numel() == problem.targets.numel():  # also where N = S: the trainer caches per token
        ref_logps = torch.where(problem.targets == IGNORE, 0, ref_logps.to(token_logps.dtype))
        reference, ratio = per_sequence(ref_logps, problem), per_sequence(token_logps - ref_logps, problem)
    else:
        reference, ratio = ref_logps.double(), policy - ref_logps
    return LogRatio(ratio.to(problem.dtype), policy.to(problem.dtype), reference.to(problem.dtype), token_logps)


def objective(token_logps: Tensor, ref_logps: Tensor | None, problem: Problem, coupling: Coupling) -> Tensor:
    """The loss ``[]`` from token log-probabilities ``[N]`` of the policy and, if computed, of the reference."""
    statistics = summarise(token_logps, ref_logps, problem)
    loss = pair_losses(margins(statistics, coupling), coupling.loss_type).sum() / divisor(coupling)
    if coupling.nll_weight:
        loss = loss + coupling.nll_weight * expert_nll(statistics.policy_logps, problem, coupling)
    return loss


def derivative(token_logps: Tensor, ref_logps: Tensor | None, problem: Problem, coupling: Coupling) -> Tensor:
    """∂ objective / ∂ token_logps ``[N]``; that of a sequence needs the log-probabilities of its group only."""
    u = margins(summarise(token_logps, ref_logps, problem), coupling)
    slope = pair_slopes(u, coupling.loss_type) * (coupling.beta / divisor(coupling))
    slopes = torch.stack([slope, -slope], 1).flatten()
    by_sequence = slopes.new_zeros(problem.sequences).index_add(0, coupling.pairs.flatten(), slopes)
    if coupling.nll_weight:
        share = coupling.nll_weight / expert_tokens(problem, coupling)
        by_sequence -= torch.where(experts(problem, coupling), share, 0)
    return by_sequence[problem.sequence]


def margins(statistics: LogRatio, coupling: Coupling) -> Tensor:
    """u ``[P]`` = β · (ρ(expert) − ρ(synthetic))."""
    expert, synthetic = statistics.log_ratio[coupling.pairs].unbind(1)
    return coupling.beta * (expert - synthetic)


def divisor(coupling: Coupling) -> float:
    return coupling.num_pairs or max(coupling.pairs.shape[0], 1)


def pair_losses(u: Tensor, loss_type: str) -> Tensor:
    if loss_type == "sigmoid":
        return -torch.nn.functional.logsigmoid(u)
    return torch.relu(1 - u) if loss_type == "hinge" else -u


def pair_slopes(u: Tensor, loss_type: str) -> Tensor:
    """The derivative of each of ``pair_losses``."""
    if loss_type == "sigmoid":
        return -torch.sigmoid(-u)
    return -(u < 1).to(u.dtype) if loss_type == "hinge" else -torch.ones_like(u)


def expert_nll(policy_logps: Tensor, problem: Problem, coupling: Coupling) -> Tensor:
    """Mean −log π_θ(y_t) over the experts' tokens, each distinct expert once."""
    # where, not a product: the log-probability of a synthetic answer may be NaN
    total = -torch.where(experts(problem, coupling), policy_logps, 0).sum()
    return total / expert_tokens(problem, coupling)


def experts(problem: Problem, coupling: Coupling) -> Tensor:
    """Which sequences ``[S]`` are the expert of a pair."""
    none = torch.zeros(problem.sequences, dtype=torch.bool, device=problem.targets.device)
    return none.index_fill(0, coupling.pairs[:, 0], True)


def expert_tokens(problem: Problem, coupling: Coupling) -> Tensor | float:
    if coupling.num_tokens is not None:
        return coupling.num_tokens
    return (experts(problem, coupling)[problem.sequence] & (problem.targets != IGNORE)).sum().clamp(min=1)
