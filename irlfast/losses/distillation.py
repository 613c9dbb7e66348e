"""Distillation of a teacher into the policy, on answers that the policy sampled.

SDFT (arXiv 2601.19897) and OPSD (arXiv 2601.18734) distil the policy itself, with the demonstration in its prompt.
Names are those of TRL's ``SDFTTrainer``.
"""

from typing import Any

from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, Teacher, arguments, arguments_of_both
from irlfast.ops import Head

KINDS: dict[float, dict[str, Any]] = {0.0: {"kind": "forward_kl"}, 1.0: {"kind": "reverse_kl"}}
MAX_LOG_WEIGHT = 20.0  # of an importance weight before it is clipped: its exponential stays finite


def distillation_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    normalisers: Normalisers,
    *,
    teacher: Teacher,
    mode: str,
    alpha: float,
    top_k: int,
    add_tail: bool = False,
    is_clip: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Compute a divergence between teacher T and policy π per token: its mean over an answer, then over answers.

    - ``mode`` "full_logits": KL(T ‖ π) at ``alpha`` 0, KL(π ‖ T) at 1, and between them the generalised Jensen-Shannon
      divergence α KL(T ‖ m) + (1 − α) KL(π ‖ m), with m = α T + (1 − α) π.
    - "topk_logits": the same over the policy's ``top_k`` most likely tokens. ``add_tail`` counts all others as one more
      token. Without it, the k are renormalised.
    - "sampled_token": sg(log π(y_t) − log T(y_t)) · log π(y_t), whose mean over y_t ~ π has the gradient of KL(π ‖ T).

    Both softmaxes have the ``temperature`` that the answers were sampled with. With ``is_clip``, a token's loss has the
    weight min(π(y_t)/π_old(y_t), ``is_clip``) without a gradient, where π_old is the policy that sampled.
    """
    head, teacher = tempered(head, temperature), teacher._replace(head=tempered(teacher.head, temperature))
    if mode == "sampled_token":
        divergence, losses = sampled_divergence(hidden, head, batch, teacher)
    else:
        tokens = top_k if mode == "topk_logits" else None
        losses = full_divergence(hidden, head, batch, teacher, alpha, tokens, add_tail)
        divergence = losses.detach()
    if is_clip is not None:
        assert batch.old_logps is not None
        change = token_logps(hidden.detach(), head, batch).detach() - batch.old_logps
        losses = losses * change.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp().clamp(max=is_clip)
    lengths = batch.cu_seqlens.diff()
    loss = (losses / lengths.repeat_interleave(lengths, output_size=len(losses))).sum() / normalisers.pairs
    metrics = {
        "count": lengths.new_full((), len(lengths)),
        "loss": loss.detach() * normalisers.pairs,
        "divergence": divergence.sum(),
        "length/synthetic": lengths.sum(),
    }
    return loss, metrics


def sampled_divergence(hidden: Tensor, head: Head, batch: Batch, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Return per token ``[N]`` the estimate log π(y_t) − log T(y_t) of KL(π ‖ T), and the loss with its gradient."""
    logps = token_logps(hidden, head, batch)
    log_ratio = logps.detach() - token_logps(teacher.hidden, teacher.head, batch._replace(rows=teacher.rows))
    return log_ratio, log_ratio * logps


def full_divergence(
    hidden: Tensor, head: Head, batch: Batch, teacher: Teacher, alpha: float, top_k: int | None, add_tail: bool
) -> Tensor:
    """Return the divergence ``[N]`` of each token over the vocabulary, or over the ``top_k`` tokens of the policy."""
    return ops.token_divergence(
        hidden,
        **arguments_of_both(head, batch, teacher),
        **KINDS.get(alpha, {"kind": "jensen_shannon", "beta": alpha}),
        top_k=top_k and min(top_k, len(head.weight)),
        top_k_of="policy",
        tail=add_tail,
    )


def token_logps(hidden: Tensor, head: Head, batch: Batch) -> Tensor:
    """Return the log-probability ``[N]`` of each answer token."""
    return ops.log_ratio(hidden, **arguments(head, batch)).token_logps


def tempered(head: Head, temperature: float) -> Head:
    """Return the head whose logits are those of ``head`` divided by the temperature."""
    softcap = None if head.logit_softcap is None else head.logit_softcap / temperature
    return head._replace(logit_scale=head.logit_scale / temperature, logit_softcap=softcap)
