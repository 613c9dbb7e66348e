"""Labels of Transformers, ``[B, T]``, as the targets and offsets that the operations take."""

from typing import NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.checks import INTEGERS, check_tensor
from irlfast.ops.common.types import IGNORE


class FlatLabels(NamedTuple):
    """Result of :func:`irlfast.ops.flatten_labels`: one sequence per row of the labels."""

    targets: Tensor  # [B · T] int64, −100 where skipped
    cu_seqlens: Tensor  # [B + 1] int32


def flatten_labels(
    labels: Tensor,  # [B, T]
    *,
    shifted: bool,
    ignore_index: int = IGNORE,
) -> FlatLabels:
    """Labels ``[B, T]`` as the ``targets`` and ``cu_seqlens`` of every operation, beside ``hidden.flatten(0, 1)``.

    - ``labels`` int64 or int32: the token of each position, or ``ignore_index`` where no loss is wanted.
    - ``shifted``: whether position t predicts ``labels[:, t]``, as Liger's losses have it. Otherwise it predicts
      ``labels[:, t + 1]``, as the labels of a Transformers model have it, and the last position predicts nothing.

    All positions stay, so that statistics per token can be viewed as ``[B, T]``, a cached reference ``[B, T]`` can be
    flattened, and torch.compile sees fixed shapes. The operations compute no logits where the target is −100.

    Raises:
        ValueError: labels have a wrong shape or dtype.
    """
    check_tensor(labels, "labels", "[B, T]", INTEGERS, getattr(labels, "device", torch.device("cpu")))
    if not shifted:
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    count, length = labels.shape
    offsets = torch.arange(count + 1, dtype=torch.int32, device=labels.device) * length
    return FlatLabels(labels.masked_fill(labels == ignore_index, IGNORE).flatten().long(), offsets)
