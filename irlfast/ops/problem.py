"""What every backend is given, and what all of them share once the log-probabilities of the tokens are known.

A backend is a module with two functions, ``token_logps`` and ``pair_loss``; see ``plain.py`` for their meaning.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # a target that is skipped

# From token log-probabilities [N] of the policy and of the reference to a loss: how the sequences are coupled.
Objective = Callable[[Tensor, "Tensor | None"], Tensor]


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

    def rows_of(self, tokens: Tensor) -> Tensor:
        return tokens if self.rows is None else self.rows[tokens]

    def zeros(self) -> Tensor:
        """A log-probability ``[N]`` for each target."""
        return torch.zeros(self.targets.shape, dtype=self.dtype, device=self.targets.device)

    def scored(self) -> Tensor:
        """Indices of the targets that are not skipped."""
        return (self.targets != IGNORE).nonzero().flatten()


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


def summarise(token_logps: Tensor, ref_logps: Tensor | None, problem: Problem) -> LogRatio:
    """Sequence statistics from token log-probabilities and the reference's, per token ``[N]`` or sequence ``[S]``.

    Per token, the difference is taken before the sum: it is small, so that nothing is lost by adding it up.
    """
    policy = per_sequence(token_logps, problem)
    if ref_logps is None:
        reference, ratio = torch.zeros_like(policy), policy
    elif ref_logps.numel() == problem.targets.numel():  # also where N = S: the trainer caches per token
        ref_logps = torch.where(problem.targets == IGNORE, 0, ref_logps.to(token_logps.dtype))
        reference, ratio = per_sequence(ref_logps, problem), per_sequence(token_logps - ref_logps, problem)
    else:
        reference, ratio = ref_logps.double(), policy - ref_logps
    return LogRatio(ratio.to(problem.dtype), policy.to(problem.dtype), reference.to(problem.dtype), token_logps)


def pair_losses(u: Tensor, loss_type: str) -> Tensor:
    """Loss of each pair from ``u = β · (ρ(expert) − ρ(synthetic))``."""
    if loss_type == "sigmoid":
        return -torch.nn.functional.logsigmoid(u)
    return torch.relu(1 - u) if loss_type == "hinge" else -u


def expert_nll(policy_logps: Tensor, pairs: Tensor, problem: Problem, num_tokens: float | None) -> Tensor:
    """Mean −log π_θ(y_t) over the experts' tokens, each distinct expert once."""
    expert = torch.zeros(problem.sequences, dtype=torch.bool, device=pairs.device).index_fill(0, pairs[:, 0], True)
    # where, not a product: the log-probability of a synthetic answer may be NaN
    total = -torch.where(expert, policy_logps, 0).sum()
    if num_tokens is None:
        return total / (expert[problem.sequence] & (problem.targets != IGNORE)).sum().clamp(min=1)
    return total / num_tokens
