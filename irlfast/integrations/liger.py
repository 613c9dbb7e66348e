"""``LigerFusedLinearDPOLoss`` by the pair slab: the same call and results, with fewer products and less memory.

from irlfast.integrations.liger import LigerFusedLinearDPOLoss
"""

import torch
from torch import Tensor

from irlfast import ops


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """DPO (arXiv 2305.18290) from hidden states, with the interface of Liger-Kernel's class of this name.

    ``chunk_size`` and ``compiled`` are accepted and have no effect.

    Raises:
        ValueError: an option of Liger's is not supported: losses other than ``sigmoid`` and ``hinge``, smoothed labels,
            averaged log-probabilities.
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
    ) -> None:
        super().__init__()
        for name, value, expected in (
            ("loss_type", loss_type, ("sigmoid", "hinge")),
            ("average_log_prob", average_log_prob, (False,)),
            ("label_smoothing", label_smoothing, (0.0,)),
        ):
            if value not in expected:
                raise ValueError(f"{name}: found {value!r}, expected {' or '.join(map(repr, expected))}")
        self.ignore_index, self.use_ref_model, self.compute_nll_loss = ignore_index, use_ref_model, compute_nll_loss
        self.beta, self.loss_type, self.nll_weight = beta, loss_type, alpha if compute_nll_loss else 0.0

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
        """
        sequences, length, _ = _input.shape
        count = sequences // 2
        hidden = _input.flatten(0, 1)
        if not self.use_ref_model:
            ref_input = ref_weight = ref_bias = None
        result = ops.pair_loss(
            hidden,
            lin_weight,
            target.masked_fill(target == self.ignore_index, -100).flatten(),
            torch.arange(sequences + 1, dtype=torch.int32, device=target.device) * length,
            pairs=torch.arange(sequences, device=target.device).view(2, count).T,
            bias=bias,
            ref_hidden=None if ref_input is None else ref_input.flatten(0, 1),
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            beta=self.beta,
            loss_type=self.loss_type,
            nll_weight=self.nll_weight,
        )
        with torch.no_grad():
            mean_row = lin_weight.float().mean(0)
            means = _input.view(2, -1, hidden.shape[1]).float().mean(1) @ mean_row
            if bias is not None:
                means += bias.float().mean()
        rewards = self.beta * result.log_ratio
        nll = result.nll_loss if self.compute_nll_loss else torch.zeros_like(result.nll_loss)
        return result.loss, (*result.policy_logps.chunk(2), *means, nll, *rewards.chunk(2))
