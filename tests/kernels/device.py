"""The device on which the kernels are tested: a GPU where there is one, else the CPU, where they are emulated."""

from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(case: dict[str, Any]) -> dict[str, Any]:
    """The case with its tensors on this device, as new leaves."""
    return {
        name: value.detach().to(DEVICE).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in case.items()
    }
