"""The records that the operations pass on to their backends, and those that they return."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # a target that is skipped


class HeadInputs(NamedTuple):
    """Policy or reference. Its logits are ``softcap(logit_scale · (hidden @ weightᵀ + bias))``."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    def cast(self, dtype: torch.dtype) -> "HeadInputs":
        """The operands of the product in this dtype. The bias stays as it is: it is added to fp32 logits."""
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


class ScoredTokens(NamedTuple):
    """The tokens that are scored, and the options of their scoring."""

    targets: Tensor  # [N] int64, IGNORE where skipped
    rows: Tensor | None  # [N] int64: the hidden row that predicts each target; None where row n predicts target n
    sequence_ids: Tensor  # [N] int64: the sequence that each target belongs to
    num_sequences: int  # S
    logit_scale: float
    logit_softcap: float | None
    operands: torch.dtype  # of the products: hidden and weight are cast to it
    buffer_mb: float  # the most memory for logits, in MiB
    skip_mass: float = 0.0  # tiles of the vocabulary that weigh less than this are left out of the gradient
    ref_logps: Tensor | None = None  # the cached reference, per token [N] or per sequence [S]
    group: str | None = None  # the name of the process group whose ranks share the vocabulary; None: one rank has all
    first_token: int = 0  # the token of the first row of this rank's weight
    widest_shard: int = 0  # the most rows of weight that a rank has; 0 without a group

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits and the statistics: fp32, or fp64 for operands in fp64."""
        return torch.promote_types(self.operands, torch.float32)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """The hidden rows that predict the targets at these indices."""
        return tokens if self.rows is None else self.rows[tokens]

    def zeros(self) -> Tensor:
        """A log-probability ``[N]`` of 0 for each target."""
        return torch.zeros(self.targets.shape, dtype=self.dtype, device=self.targets.device)

    def indices(self) -> Tensor:
        """Indices of the targets that are not skipped."""
        return (self.targets != IGNORE).nonzero().flatten()


class PairLossSpec(NamedTuple):
    """The loss on pairs of sequences, see :func:`irlfast.ops.pair_loss`."""

    pairs: Tensor  # [P, 2] int64: expert, synthetic
    beta: float
    loss_type: str  # a key of irlfast.ops.pair_loss.losses.PAIR_LOSSES
    nll_weight: float
    num_pairs: float | None  # the pair losses are divided by it; None: by P
    num_tokens: float | None  # nll_loss is divided by it; None: by the number of the experts' scored tokens


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
