"""``LigerFusedLinearDPOLoss`` by the pair slab: the same call and results, with fewer products and less memory.

from irlfast.integrations.liger import LigerFusedLinearDPOLoss
"""

from typing import Any

import torch
from torch import Tensor

from irlfast import ops

LOSSES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """DPO (arXiv 2305.18290) from hidden states, with the interface of Liger-Kernel's class of this name (0.8.5).

    Arguments are Liger's. ``chunk_size`` and ``compiled`` are accepted and have no effect. An answer without tokens has
    the average log-probability 0 with ``average_log_prob``, where Liger's is NaN.

    Raises:
        ValueError: Liger's class refuses ``loss_type`` or ``label_smoothing`` too.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in LOSSES:
            raise ValueError(f"Unsupported loss_type: found {loss_type!r}, expected one of {', '.join(LOSSES)}")
        if loss_type == "exo_pair" and label_smoothing <= 0:
            expected = "label_smoothing must be > 0 for loss_type='exo_pair', 1e-3 in its paper"
            raise ValueError(f"{expected}: found {label_smoothing}")
        if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust': found {label_smoothing}")
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.compiled, self.use_ref_model = compute_nll_loss, compiled, use_ref_model
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size
        self.loss_type, self.label_smoothing, self.discopop_tau = loss_type, label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,  # [V, H]
        _input: Tensor,  # [2P, T, H] hidden states of the chosen sequences, then of the rejected ones
        target: Tensor,  # [2P, T] the token that each position predicts, or ignore_index
        bias: Tensor | None = None,  # [V]
        ref_input: Tensor | None = None,  # [2P, T, H']
        ref_weight: Tensor | None = None,  # [V, H']
        ref_bias: Tensor | None = None,  # [V]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss and Liger's statistics.

        These are the log-probabilities ``[P]`` of the chosen and of the rejected sequences, the means of their logits,
        the negative log-likelihood per token of the chosen sequences, and the rewards ``[P]`` of both.

        Raises:
            ValueError: a tensor has a wrong shape, dtype, device or value, or the number of sequences is odd.
        """
        sequences = _input.shape[0]
        if sequences % 2:
            raise ValueError(f"_input: found {sequences} sequences, expected chosen and as many rejected ones")
        options = self.loss_options()
        if self.use_ref_model:
            if ref_input is None:
                raise ValueError("ref_input: found None, expected a tensor [2P, T, H'] where use_ref_model is True")
            options |= {"ref_hidden": ref_input.flatten(0, 1), "ref_weight": ref_weight, "ref_bias": ref_bias}
        if self.average_log_prob:
            options["token_weights"] = token_shares(target != self.ignore_index)
        labels = ops.flatten_labels(target, shifted=True, ignore_index=self.ignore_index)
        result = ops.pair_loss(
            _input.flatten(0, 1),
            lin_weight,
            labels.targets,
            labels.cu_seqlens,
            pairs=torch.arange(sequences, device=target.device).view(2, -1).T,
            bias=bias,
            **options,
        )
        rewards = self.beta * result.log_ratio
        nll = result.nll_loss if self.compute_nll_loss else torch.zeros_like(result.nll_loss)
        means = mean_logits(_input, lin_weight, bias)
        return result.loss, (*result.policy_logps.chunk(2), *means, nll, *rewards.chunk(2))

    def loss_options(self) -> dict[str, Any]:
        """The loss for ``ops.pair_loss``, with the options that this loss has."""
        options: dict[str, Any] = {"beta": self.beta, "loss_type": self.loss_type}
        if self.loss_type in ("robust", "exo_pair"):
            options["label_smoothing"] = self.label_smoothing
        if self.loss_type == "discopop":
            options["discopop_tau"] = self.discopop_tau
        if self.compute_nll_loss:
            options["nll_weight"] = self.alpha
        return options


def token_shares(scored: Tensor) -> Tensor:
    """Weights ``[2P · T]`` that turn sums over the scored tokens of each row ``[2P, T]`` into means."""
    return (1 / scored.sum(1, keepdim=True).clamp(min=1)).expand(scored.shape).flatten()


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The means ``[2]`` of the logits of the chosen and of the rejected sequences, over all positions."""
    rows = hidden.unflatten(0, (2, -1)).mean((1, 2), dtype=torch.float32)  # [2, H]
    means = rows @ weight.mean(0, dtype=torch.float32)
    return means if bias is None else means + bias.mean(dtype=torch.float32)
