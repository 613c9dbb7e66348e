"""The mismatch between sampler and trainer: both have the policy's weights, but round in other ways.

vLLM computes in the run's ``dtype`` with kernels of its own, so that its log-probabilities are not quite the trainer's.
An answer is then drawn from a slightly other policy than the one whose gradient is taken. Names are those of TRL's
``GRPOTrainer``.
"""

from array import array
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from irlfast.common.messages import log

MAX_LOG_RATIO = 20.0  # of a weight before it is cut: its exponential stays finite


def measure_mismatch(trainer: Iterable[Tensor], sampler: Iterable[Tensor], phase: str) -> dict[str, float]:
    """Return, and log for a ``phase``, how far the sampler's log-probabilities of its answers are from the trainer's.

    Both have a tensor for each answer, with its tokens' log-probabilities in nats. A token whose log-probability the
    sampler does not know (NaN) counts as equal. Nothing is returned where ``sampler`` is empty.

    Returns:
        The mean and the largest absolute difference of a token's log-probability, and the least, mean and largest ratio
        π_trainer(y)/π_sampler(y) of an answer.
    """
    if not sampler:
        return {}
    each, sums = array("d"), array("d")  # the differences of tokens, and their sum in each answer
    for both in zip(trainer, sampler, strict=True):
        change = difference(*both)
        each.fromlist(change.tolist())
        sums.append(change.sum().item())
    changes, ratios = torch.from_numpy(np.array(each)).abs(), ratio_of(torch.from_numpy(np.array(sums)))
    mean, largest = changes.mean().item(), changes.max().item()
    log(
        f"{phase}: log-probabilities of tokens differ between sampler and trainer by {mean:.2g} nats on average and "
        f"{largest:.2g} at most; the ratio of an answer's probabilities is {ratios.mean():.4g} on average and "
        f"{ratios.max():.4g} at most"
    )
    return {
        "sampling/sampling_logp_difference/mean": mean,
        "sampling/sampling_logp_difference/max": largest,
        "sampling/importance_sampling_ratio/min": ratios.min().item(),
        "sampling/importance_sampling_ratio/mean": ratios.mean().item(),
        "sampling/importance_sampling_ratio/max": ratios.max().item(),
    }


def importance_weights(trainer: Tensor, sampler: Tensor, mode: str, clip_max: float | None) -> Tensor:
    """Return the weights π_trainer/π_sampler of an answer's tokens, fp32, from both log-probabilities ``[T]``.

    ``mode`` is ``token_`` or ``sequence_``: each token has its own ratio, or that of the whole answer. It ends with
    ``truncate``: a ratio above ``clip_max`` is cut to it, or ``mask``: it becomes 0. None is no bound. A token whose
    log-probability the sampler does not know (NaN) has the ratio 1.

    Ratios of answers without a bound make the gradient unbiased, with a variance that grows with the answer. Those of
    tokens leave the ratios of the answer's other tokens out: their bias is of second order in the mismatch.
    """
    change = difference(trainer, sampler)
    level, how = mode.split("_")
    ratio = ratio_of(change.sum().expand(len(change)) if level == "sequence" else change)
    if clip_max is not None:
        ratio = ratio.clamp(max=clip_max) if how == "truncate" else ratio.where(ratio <= clip_max, 0.0)
    return ratio.float()


def difference(trainer: Tensor, sampler: Tensor) -> Tensor:
    return (trainer.double() - sampler.double()).nan_to_num(nan=0.0)


def ratio_of(change: Tensor) -> Tensor:
    return change.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
