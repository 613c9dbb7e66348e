"""What every loss of a batch is given and returns: its share of a step's loss, and figures for the log.

Figures are sums over segments, which the engine divides by their ``count``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from irlfast.data.packing import Batch
from irlfast.ops import Head
from irlfast.ops.common.sequences import sequence_ids


class Normalisers(NamedTuple):
    """What a micro-batch's sums are divided by: a step's segments and expert tokens, over its processes."""

    pairs: float
    tokens: float


Metrics = dict[str, Tensor]
Loss = Callable[[Tensor, Head, Batch, Normalisers], tuple[Tensor, Metrics]]


def arguments(head: Head, batch: Batch) -> dict[str, Any]:
    return {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
        "targets": batch.targets,
        "cu_seqlens": batch.cu_seqlens,
        "rows": batch.rows,
    }


def per_sequence(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums ``[S]`` of values ``[N]``."""
    return values.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence_ids(cu_seqlens, len(values)), values)
