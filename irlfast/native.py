"""The native modules of ``csrc/``: each None where it was not built, and PyTorch does its work."""

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
    """The stream that work on this device is queued in, as ``cuda`` takes it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(logits: Tensor) -> tuple[int, str, int]:
    """Logits ``[N, V]`` as the modules take them."""
    return logits.data_ptr(), name(logits.dtype), logits.stride(0)


def scoring(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[int, int, int, float, float]:
    """What scores them; ``targets`` ``[N]`` int64, contiguous."""
    return *logits.shape, targets.data_ptr(), scale, softcap or 0.0
