"""Checks of the arguments of ``token_logps`` and ``logits_log_ratio``."""

import torch
from torch import Tensor

from irlfast.ops.common.checks import (
    FLOATS,
    INTEGERS,
    check_cached,
    check_cu_seqlens,
    check_offsets,
    check_scaling,
    check_targets,
    check_tensor,
    choose_backend,
    require,
)


def check_logits(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, inplace: bool, backend: str
) -> str:
    """Check what both operations take, and return the chosen backend."""
    device = getattr(logits, "device", torch.device("cpu"))
    check_tensor(logits, "logits", "[N, V]", FLOATS, device)
    rows, vocabulary = logits.shape
    require(vocabulary > 0, "logits", logits, "[N, V] with V > 0")
    check_tensor(targets, "targets", "[N]", INTEGERS, device)
    require(targets.numel() == rows, "targets", targets, "[{}], as logits has that many rows", rows)
    check_scaling(scale, softcap)
    check_targets(targets, vocabulary)
    backend = choose_backend(backend, logits, "logits")
    if backend != "plain":
        check_strides(logits, "logits", inplace)
    return backend


def check_strides(logits: Tensor, name: str, inplace: bool) -> None:
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1 and vocabulary > 1:
        expected = "adjacent elements in every row, as of .contiguous()"
    elif inplace and rows > 1 and logits.stride(0) < vocabulary:
        expected = "rows at least {} apart where inplace_backward"
    else:
        return
    require(False, name, f"strides {tuple(logits.stride())}", expected, vocabulary)


def check_sequences(logits: Tensor, targets: Tensor, cu_seqlens: Tensor) -> None:
    check_offsets(cu_seqlens, logits.device)
    check_cu_seqlens(cu_seqlens, targets.numel(), "the number of targets")


def check_reference(
    logits: Tensor, cu_seqlens: Tensor, ref_logits: Tensor | None, ref_logps: Tensor | None, backend: str
) -> None:
    tokens, sequences = logits.shape[0], cu_seqlens.numel() - 1
    if ref_logits is not None:
        require(ref_logps is None, "ref_logps", ref_logps, "None where ref_logits is given (one reference, not two)")
        check_tensor(ref_logits, "ref_logits", "[N, V]", FLOATS, logits.device)
        require(ref_logits.shape == logits.shape, "ref_logits", ref_logits, "[{}, {}], as logits", *logits.shape)
        if backend != "plain":
            check_strides(ref_logits, "ref_logits", inplace=False)
    if ref_logps is not None:
        check_cached(ref_logps, logits.device, tokens, sequences)
