"""The records that the operations pass on to their backends, and those that they return."""

from collections.abc import Callable, Sequence
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
    token_weights: Tensor | None = None  # [N] factors of the tokens' log-ratios, 0 where skipped

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits and the statistics: fp32, or fp64 for operands in fp64."""
        return torch.promote_types(self.operands, torch.float32)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """The hidden rows that predict the targets at these indices."""
        return tokens if self.rows is None else self.rows[tokens]

    def only(self, tokens: Tensor) -> "ScoredTokens":
        """The targets at these indices, without a cached reference."""
        weights = None if self.token_weights is None else self.token_weights[tokens]
        ids, rows = self.sequence_ids[tokens], self.rows_of(tokens)
        return self._replace(
            targets=self.targets[tokens], rows=rows, sequence_ids=ids, ref_logps=None, token_weights=weights
        )

    def split(self, sizes: int | Sequence[int]) -> list["ScoredTokens"]:
        """Consecutive parts of these sizes, as views, of what :meth:`only` returns."""
        fields = {name: getattr(self, name) for name in ("targets", "rows", "sequence_ids", "token_weights")}
        parts = {name: tensor.split(sizes) for name, tensor in fields.items() if tensor is not None}
        return [self._replace(**dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]

    def without_tensors(self) -> "ScoredTokens":
        """The options alone, for a context that saves the tensors by itself."""
        return self._replace(targets=None, rows=None, sequence_ids=None, ref_logps=None, token_weights=None)  # type: ignore[arg-type]

    def zeros(self) -> Tensor:
        """A log-probability ``[N]`` of 0 for each target."""
        return torch.zeros(self.targets.shape, dtype=self.dtype, device=self.targets.device)

    def indices(self) -> Tensor:
        """Indices of the targets that are not skipped."""
        return (self.targets != IGNORE).nonzero().flatten()


PairFunction = Callable[[Tensor, Tensor, float], Tensor]  # (ρ(y) [P], ρ(ỹ) [P], β) -> the loss of each pair [P]


class PairLossSpec(NamedTuple):
    """The loss on pairs of sequences, see :func:`irlfast.ops.pair_loss`."""

    pairs: Tensor  # [P, 2] int64: expert, synthetic
    beta: float
    loss_types: tuple[str | PairFunction, ...]  # keys of irlfast.ops.pair_loss.losses.PAIR_LOSSES, or functions
    loss_weights: tuple[float, ...]  # one per loss type
    pair_weights: Tensor | None = None  # [P]
    nll_weight: float = 0.0
    num_pairs: float | None = None  # the pair losses are divided by it; None: by P
    num_tokens: float | None = None  # nll_loss is divided by it; None: by the number of the experts' scored tokens
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    reward_shift: float = 0.0
    renyi_alpha: float = 0.5
    f_divergence_type: str = "reverse_kl"  # a key of irlfast.ops.pair_loss.divergences.F_DIVERGENCES
    f_alpha_divergence_coef: float = 0.5

    def is_named(self) -> bool:
        """Return whether every loss type is a name, not a function."""
        return all(isinstance(loss_type, str) for loss_type in self.loss_types)


class TokenStatistics(NamedTuple):
    """Result of :func:`irlfast.ops.token_statistics`; ``[N]`` each, fp32 (fp64), 0 where the target is skipped."""

    token_logps: Tensor  # log p(y)
    entropy: Tensor  # −Σ_v p_v log p_v, in nats
    lse: Tensor  # log Σ_v exp z_v


class LogRatio(NamedTuple):
    """Result of :func:`irlfast.ops.log_ratio`; fp32, or fp64 where ``hidden`` is."""

    log_ratio: Tensor  # [S] ρ = Σ_t w_t (log π_θ(y_t) − log π_ref(y_t)); policy_logps where there is no reference
    policy_logps: Tensor  # [S] Σ_t w_t log π_θ(y_t), with w_t = 1 unless there are token_weights
    ref_logps: Tensor  # [S] zeros where there is no reference
    token_logps: Tensor  # [N] log π_θ(y_t), 0 where the target is skipped
    token_entropy: Tensor | None = None  # [N] of the policy, 0 where skipped; with token_statistics
    token_lse: Tensor | None = None  # [N] log-sum-exp of the policy's logits, likewise


class PairLoss(NamedTuple):
    """Result of :func:`irlfast.ops.pair_loss`; only ``loss`` carries a gradient."""

    loss: Tensor  # []
    log_ratio: Tensor  # [S]
    policy_logps: Tensor  # [S]
    ref_logps: Tensor  # [S]
    nll_loss: Tensor  # [] −Σ log π_θ(y_t) of the experts / num_tokens
    pair_losses: Tensor  # [P] before pair_weights
