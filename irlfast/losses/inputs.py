"""The arguments and results that all losses share.

A loss takes the hidden states, the head, the batch and the normalisers of a micro-batch. It returns the micro-batch's
share of the step's loss, and metrics: sums over prompt groups, which the engine divides by their ``count``. In a phase
with a teacher, it takes the keyword ``teacher``, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from irlfast.data.packing import Batch
from irlfast.ops import Head
from irlfast.ops.common.sequences import sequence_ids


class Normalisers(NamedTuple):
    """The divisors of a micro-batch's sums: counts of a whole step, over all processes."""

    pairs: float  # prompt groups
    tokens: float  # expert tokens: of the first answer of each group
    other_tokens: float = 0.0  # tokens of all other answers


class Teacher(NamedTuple):
    """The teacher's reading of a micro-batch's answers. Nothing here has a gradient."""

    hidden: Tensor  # [R', H]
    head: Head
    rows: Tensor  # [N] int64: the row of ``hidden`` that predicts each target


Metrics = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Metrics]]


def arguments(head: Head, batch: Batch) -> dict[str, Any]:
    """Return the arguments that :mod:`irlfast.ops` takes of a head and a batch."""
    return {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
        "targets": batch.targets,
        "cu_seqlens": batch.cu_seqlens,
        "rows": batch.rows,
    }


def arguments_of_both(head: Head, batch: Batch, teacher: Teacher) -> dict[str, Any]:
    """Return the arguments that :func:`irlfast.ops.token_divergence` takes of the policy's head and a teacher."""
    return {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
        "rows": batch.rows,
        "ref_hidden": teacher.hidden,
        "ref_weight": teacher.head.weight,
        "ref_bias": teacher.head.bias,
        "ref_logit_scale": teacher.head.logit_scale,
        "ref_logit_softcap": teacher.head.logit_softcap,
        "ref_rows": teacher.rows,
    }


def per_sequence(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum per-token values ``[N]`` over each sequence: ``[S]``."""
    return values.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence_ids(cu_seqlens, len(values)), values)
