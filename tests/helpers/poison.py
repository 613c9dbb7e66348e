"""Fill the memory of a new tensor with NaN, so that a test that reads a value before it is written cannot pass.

torch itself does this only together with deterministic algorithms, which are not those that users run. Out of reach are
compiled graphs, tensors that C++ makes for itself, and the processes of runs.
"""

import functools
from collections.abc import Callable

import torch
from torch.utils._device import _device_constructors


def poison_new_memory() -> None:
    """From now on, torch.empty, torch.empty_like and Tensor.new_empty give NaN on the CPU, if the dtype has it."""
    _device_constructors()  # it caches torch's functions, by which `torch.device("meta")` knows where to act
    torch.empty, torch.empty_like = filled(torch.empty), filled(torch.empty_like)
    torch.Tensor.new_empty = filled(torch.Tensor.new_empty)


def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def make_filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if not torch.compiler.is_compiling() and tensor.device.type == "cpu" and tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    return make_filled
