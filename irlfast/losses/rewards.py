"""The losses of reward models, on pairs (expert, synthetic)."""

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, per_sequence
from irlfast.ops import Head
from irlfast.ops.common.sequences import sequence_ids
from irlfast.ops.rewards.losses import REWARD_LOSSES, Options

GAUSSIAN = "gaussian"  # the reward loss whose heads have two outputs each


def reward_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    normalisers: Normalisers,
    *,
    kind: str,
    level: str,
    alpha: float,
    regularization: float,
) -> tuple[Tensor, Metrics]:
    """Compute the loss of a reward model's M heads on pairs (expert, synthetic), averaged over heads.

    :func:`irlfast.ops.discriminator_loss` has the formula of every ``kind`` but ``gaussian``. At ``level`` "token", a
    mean is over the tokens of the step.
    """
    pairs = (len(batch.cu_seqlens) - 1) // 2
    if kind == GAUSSIAN:
        outputs = ops.reward_head(hidden, head.weight, batch.cu_seqlens, rows=batch.rows, bias=head.bias)  # [S, 2M]
        terms = variance_loss(outputs[0::2], outputs[1::2], regularization).mean(1)
        loss = terms.sum() / normalisers.pairs
        return loss, metrics_of(loss, outputs.detach()[:, 0::2].mean(1), normalisers)
    expert = torch.arange(2 * pairs, dtype=torch.int64, device=hidden.device) % 2 == 0
    if level == "token":
        logits = ops.reward_head(
            hidden, head.weight, batch.cu_seqlens, rows=batch.rows, bias=head.bias, pooling="token"
        )
        loss = token_loss(logits, expert[sequence_ids(batch.cu_seqlens, len(logits))], normalisers, kind, alpha)
        return loss, metrics_of(loss, per_sequence(logits.detach().mean(1), batch.cu_seqlens), normalisers)
    loss, logits, _ = ops.discriminator_loss(
        hidden,
        head.weight,
        batch.cu_seqlens,
        labels=expert,
        kind=kind,
        rows=batch.rows,
        bias=head.bias,
        alpha=alpha,
        regularization=regularization,
    )
    loss = loss * (pairs / normalisers.pairs)
    return loss, metrics_of(loss, logits.detach().mean(1), normalisers)


def token_loss(logits: Tensor, expert: Tensor, normalisers: Normalisers, kind: str, alpha: float) -> Tensor:
    """Return a micro-batch's share of a discriminator's loss, from the logits ``[N, M]`` of tokens.

    The loss is the mean over all of the step's tokens, or the mean over the experts' plus that over the others', as
    ``kind`` says. ``expert`` ``[N]`` bool says whose a token is.
    """
    loss, tokens, others = REWARD_LOSSES[kind], normalisers.tokens, normalisers.other_tokens
    if loss.mean_over == "all":
        tokens = others = tokens + others
    terms = loss.terms(logits, expert[:, None], Options(kind, alpha)).mean(1)
    return (terms * torch.where(expert, 1 / tokens, 1 / others)).sum()


def variance_loss(expert: Tensor, synthetic: Tensor, regularization: float) -> Tensor:
    """Return −log σ((μ − μ̃)/√((σ² + σ̃²)/2)) + λ(v² + ṽ²) ``[P, M]``, v = log σ², of heads' outputs ``[P, 2M]``.

    Each head has two outputs, the mean μ of an answer's reward and v. With Gaussian rewards, the expert's is the higher
    one with the probability Φ((μ − μ̃)/√(s² + s̃²)). Φ(x) ≈ σ(√(8/π)·x) and s² = (4/π)·σ² make it this loss, which is
    Bradley-Terry's for v = 0. λ holds v there where pairs do not say otherwise: they leave the scale of μ and σ open.

    Source: our reading of Inverse-RLignment (arXiv 2405.15624), Bradley-Terry with a learned variance.
    """
    (mean, log_variance), (other_mean, other_log_variance) = (
        (outputs[:, 0::2], outputs[:, 1::2]) for outputs in (expert, synthetic)
    )
    scale = ((log_variance.exp() + other_log_variance.exp()) / 2).sqrt()
    loss = -torch.nn.functional.logsigmoid((mean - other_mean) / scale)
    return loss + regularization * (log_variance**2 + other_log_variance**2)


def metrics_of(loss: Tensor, rewards: Tensor, normalisers: Normalisers) -> Metrics:
    """Return the metrics of a micro-batch from its share of the loss and the rewards ``[S]``."""
    chosen, rejected = rewards[0::2], rewards[1::2]
    return {
        "count": chosen.new_full((), len(chosen)),
        "loss": loss.detach() * normalisers.pairs,
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
    }
