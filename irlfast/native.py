"""The native modules of ``csrc/``: each None where it was not built, and PyTorch does its work."""

from typing import Any

import torch

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
