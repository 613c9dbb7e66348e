"""Checks of the arguments of ``reward_head``, ``discriminator_loss`` and ``discriminator_reward``."""

import math
from numbers import Real

import torch
from torch import Tensor

from irlfast.ops.common.checks import (
    FLOATS,
    INTEGERS,
    alternatives,
    check_cu_seqlens,
    check_offsets,
    check_pairs,
    check_range,
    check_tensor,
    check_transforms,
    choose_backend,
    device_of,
    require,
    values_visible,
)
from irlfast.ops.rewards.losses import REWARD_LOSSES, Options

MOST_HEADS = 64  # of the triton backend
SMOOTHED = ("bce", "bradley_terry")  # the losses that take label_smoothing


def check_heads(
    hidden: Tensor,
    head: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    pooling: str,
    backend: str,
) -> str:
    """Check what both operations take, and return the chosen backend."""
    device = device_of(hidden, "hidden")
    check_tensor(hidden, "hidden", "[R, H]", FLOATS, device)
    check_tensor(head, "head", "[M, H]", FLOATS, device)
    (heads, columns), size = head.shape, hidden.shape[1]
    fits = heads > 0 and 0 < columns == size
    require(fits, "head", head, "[M, {}] with M > 0 and H > 0, as hidden has H columns", size)
    if bias is not None:
        check_tensor(bias, "bias", "[M]", FLOATS, device)
        require(bias.shape[0] == heads, "bias", bias, "[{}], as head has that many rows", heads)
    check_offsets(cu_seqlens, device)
    if rows is not None:
        check_tensor(rows, "rows", "[N]", INTEGERS, device)
    require(pooling in ("last", "token"), "pooling", pooling, "'last' or 'token'")
    whose = "the rows of hidden, where rows is None" if rows is None else "the number of rows"
    check_cu_seqlens(cu_seqlens, (hidden if rows is None else rows).shape[0], whose)
    if rows is not None:
        check_range(rows, "rows", 0, hidden.shape[0], ", the rows of hidden")
    if backend == "auto" and heads > MOST_HEADS:
        backend = "plain"
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    backend = choose_backend(backend, hidden, "hidden", ("auto", "plain", "cpu", "triton"), dtype)
    if backend == "triton":
        check_transforms(backend, hidden=hidden, head=head, bias=bias)
    few = backend != "triton" or heads <= MOST_HEADS
    require(few, "head", head, f"at most {MOST_HEADS} heads by backend 'triton'; 'plain' takes any number")
    return backend


def check_options(options: Options) -> Options:
    kind, alpha, smoothing, f_max, clamp, regularization = options
    require(kind in REWARD_LOSSES, "kind", kind, alternatives(REWARD_LOSSES))
    for name, value in (("alpha", alpha), ("regularization", regularization)):
        require(isinstance(value, Real) and -math.inf < float(value) < math.inf, name, value, "a number")
    fits = isinstance(smoothing, Real) and 0 <= float(smoothing) < 0.5
    require(fits, "label_smoothing", smoothing, "0 <= label_smoothing < 0.5")
    smooths = kind in SMOOTHED or smoothing == 0
    require(smooths, "label_smoothing", smoothing, f"0 for kind {kind!r}, which has no labels to smooth")
    require(kind == "fairl" or not f_max, "f_max", f_max, f"False for kind {kind!r}, only 'fairl' has the form")
    require(isinstance(clamp, Real) and 0 < float(clamp) <= 80, "clamp", clamp, "0 < clamp <= 80")
    return options


def check_labels(labels: Tensor | None, cu_seqlens: Tensor, kind: str) -> None:
    if labels is None:
        require(is_paired(kind), "labels", labels, f"a tensor [S] for kind {kind!r}")
        return
    check_tensor(labels, "labels", "[S]", (torch.bool, *INTEGERS, *FLOATS), cu_seqlens.device)
    sequences = cu_seqlens.shape[0] - 1
    require(labels.shape[0] == sequences, "labels", labels, "[{}], the sequences of cu_seqlens", sequences)
    if values_visible(labels):
        wrong = labels[(labels != 0) & (labels != 1)]
        require(wrong.numel() == 0, "labels", wrong[0].item() if wrong.numel() else 0, "1 (expert) or 0 (synthetic)")


def check_compared(pairs: Tensor | None, labels: Tensor | None, cu_seqlens: Tensor, kind: str, pooling: str) -> None:
    if not is_paired(kind):
        require(pairs is None, "pairs", pairs, f"None for kind {kind!r}")
        return
    require(pooling == "last", "pooling", pooling, f"'last' for kind {kind!r}, which compares sequences")
    check_pairs(pairs, cu_seqlens)
    if labels is not None and values_visible(cu_seqlens):
        ordered = labels.view(-1, 2) if pairs is None else labels[pairs]
        agree = bool(((ordered[:, 0] != 0) & (ordered[:, 1] == 0)).all())
        require(agree, "labels", labels, "1 for the first and 0 for the second sequence of every pair")


def is_paired(kind: str) -> bool:
    """Return whether the loss compares the sequences of pairs."""
    return REWARD_LOSSES[kind].mean_over == "pairs"
