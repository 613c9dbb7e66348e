"""Checks of the arguments of ``token_logps`` and ``logits_log_ratio``."""

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
    check_transforms,
    choose_backend,
    device_of,
    require,
)


def check_logits(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, inplace: bool, backend: str
) -> str:
    """Check what both operations take, and return the chosen backend."""
    device = device_of(logits, "logits")
    check_tensor(logits, "logits", "[N, V]", FLOATS, device)
    rows, vocabulary = logits.shape
    require(vocabulary > 0, "logits", logits, "[N, V] with V > 0")
    check_tensor(targets, "targets", "[N]", INTEGERS, device)
    require(targets.numel() == rows, "targets", targets, "[{}], as logits has that many rows", rows)
    check_scaling(scale, softcap)
    check_targets(targets, vocabulary)
    backend = choose_backend(backend, logits, "logits")
    check_transforms(backend, logits=logits)
    if inplace and backend != "plain":
        check_strides(logits)
    return backend


def check_strides(logits: Tensor) -> None:
    """Check that a gradient can be written over the logits."""
    rows, vocabulary = logits.shape
    strides = f"strides {tuple(logits.stride())}"
    require(is_adjacent(logits), "logits", strides, "adjacent elements in every row where inplace_backward")
    apart = rows < 2 or logits.stride(0) >= vocabulary
    require(apart, "logits", strides, "rows at least {} apart where inplace_backward", vocabulary)


def is_adjacent(logits: Tensor) -> bool:
    """Return whether the elements of every row are next to each other in memory."""
    return logits.stride(1) == 1 or logits.shape[1] == 1


def check_sequences(logits: Tensor, targets: Tensor, cu_seqlens: Tensor) -> None:
    check_offsets(cu_seqlens, logits.device)
    check_cu_seqlens(cu_seqlens, targets.numel(), "the number of targets")


def check_reference(logits: Tensor, cu_seqlens: Tensor, ref_logits: Tensor | None, ref_logps: Tensor | None) -> None:
    tokens, sequences = logits.shape[0], cu_seqlens.numel() - 1
    if ref_logits is not None:
        require(ref_logps is None, "ref_logps", ref_logps, "None where ref_logits is given (one reference, not two)")
        check_tensor(ref_logits, "ref_logits", "[N, V]", FLOATS, logits.device)
        require(ref_logits.shape == logits.shape, "ref_logits", ref_logits, "[{}, {}], as logits", *logits.shape)
    if ref_logps is not None:
        check_cached(ref_logps, logits.device, tokens, sequences)
