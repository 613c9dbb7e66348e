"""The native modules of ``csrc/``. A module that was not built is None, and PyTorch does its work."""

from typing import Any

import torch
from torch import Tensor

cpu: Any
try:
    from irlfast import _cpu as cpu  # type: ignore[attr-defined, no-redef]
except ImportError:
    cpu = None

cuda: Any
try:
    from irlfast import _cuda as cuda  # type: ignore[attr-defined, no-redef]
except ImportError:
    cuda = None


def stream(device: torch.device) -> int:
    """The current stream of a device, as ``cuda`` takes it; 0 for a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(logits: Tensor) -> tuple[int, str, int]:
    """Logits ``[N, V]`` as the modules take them: address, dtype, and elements between the starts of two rows."""
    return logits.data_ptr(), name(logits.dtype), logits.stride(0)


def matrix(tensor: Tensor) -> tuple[int, str, int, int]:
    """A matrix as the modules take it: address, dtype, and elements between two rows and two columns."""
    row, column = tensor.stride()
    return tensor.data_ptr(), name(tensor.dtype), row, column


def scoring(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[int, int, int, float, float]:
    """How logits ``[N, V]`` are scored, as the modules take it; ``targets`` are ``[N]`` int64 and contiguous."""
    return *logits.shape, targets.data_ptr(), scale, softcap or 0.0
