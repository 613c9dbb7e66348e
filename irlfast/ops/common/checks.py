"""Checks of arguments that the operations share. Every error reads "argument: found X, expected Y".

Shapes, dtypes and devices are always checked. Values are checked on CPU tensors; those on a GPU only where the
environment has ``IRLFAST_CHECK=1``, because reading them waits for the GPU.
"""

import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C._functorch import is_batchedtensor
from torch._subclasses import FakeTensor
from torch.autograd.forward_ad import unpack_dual

from irlfast import native
from irlfast.ops.common.types import IGNORE

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "plain", "cpu", "triton", "cuda")
STATISTICS_BACKENDS = ("auto", "plain", "cpu", "triton")  # those with entropy and log-sum-exp
ON_GPU = ("triton", "cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton's kernels run on CPU tensors


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r}" if value is None or isinstance(value, Real | str) else type(value).__name__
    layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
    return f"{list(value.shape)} {layout}{str(value.dtype).removeprefix('torch.')} on {value.device}"


def require(holds: bool, name: str, value: Any, expected: str, *sizes: int) -> None:
    """Raise ValueError unless the condition holds.

    ``sizes`` fill the braces of ``expected`` only then: torch.compile takes a size that a string contains for constant.
    """
    if not holds:
        raise ValueError(f"{name}: found {describe(value)}, expected {expected.format(*sizes)}")


def alternatives(names: Iterable[str]) -> str:
    """``'a', 'b' or 'c'``"""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}"


def check_tensor(value: Any, name: str, shape: str, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Check type, layout, dtype and device, and the number of dimensions, which is that of ``shape`` (``[N, H]``)."""
    dimensions = shape.count(",") + 1
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    fits = isinstance(value, Tensor) and value.dim() == dimensions and value.dtype in dtypes
    require(fits and value.device == device and is_dense(value), name, value, f"{shape} {names} on {device}")


def is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def device_of(value: Any, name: str) -> torch.device:
    """The device of an operation's first tensor, where all others must be; a CPU for a value that is no tensor."""
    if not isinstance(value, Tensor):
        return torch.device("cpu")
    require(not value.is_meta, name, value, "a tensor with values")
    return value.device


def check_positive(value: Any, name: str, expected: str = "a number > 0") -> None:
    number = isinstance(value, Real)
    require(number and 0 < value < math.inf, name, value, expected)


def choose_backend(
    backend: str,
    tensor: Tensor,
    name: str,
    backends: Sequence[str] = BACKENDS,
    dtype: torch.dtype | None = None,  # of the computation, where it differs from the tensor's
) -> str:
    """The backend, checked; for ``"auto"`` the fastest that can compute with ``tensor``, the argument ``name``.

    Raises:
        ValueError: there is no such backend, or it cannot compute with this tensor's device or dtype.
        RuntimeError: ``"triton"`` without Triton, ``"cuda"`` without the native module.
    """
    kind, double = tensor.device.type, (dtype or tensor.dtype) == torch.float64
    if backend == "auto":
        return "cpu" if kind == "cpu" else "triton" if HAS_TRITON and kind == "cuda" and not double else "plain"
    require(backend in backends, "backend", backend, alternatives(backends))
    if backend == "cpu":
        require(kind == "cpu", name, tensor, "a tensor on the CPU, by backend 'cpu'")
    if backend in ON_GPU:
        check_installed(backend)
        runs = kind == "cuda" or (kind == "cpu" and emulated(backend))
        hint = " (or TRITON_INTERPRET=1)" if backend == "triton" else ""
        require(runs, name, tensor, f"a tensor on a GPU{hint}, by backend '{backend}'")
        require(not double, name, tensor, f"float32, bfloat16 or float16, by backend '{backend}'")
    return backend


def check_transforms(backend: str, **tensors: Tensor | None) -> None:
    """Refuse what only the plain backend can do: torch.func, and forward-mode derivatives of these tensors.

    Without this check, torch would leave the tangents out and say nothing.
    """
    if backend == "plain" or torch.compiler.is_compiling():
        return
    require(not are_transforms_active(), "backend", backend, "'plain' inside a transformation of torch.func")
    for name, tensor in tensors.items():
        tangent = None if tensor is None else unpack_dual(tensor).tangent
        if tangent is not None:
            expected = f"none by backend {backend!r}; 'plain' has forward-mode derivatives"
            raise ValueError(f"{name}: found a tensor with a tangent, expected {expected}")


def is_traced(tensor: Tensor) -> bool:
    """Return whether the tensor only stands for others, outside of torch.compile."""
    return not torch.compiler.is_compiling() and (isinstance(tensor, FakeTensor) or are_transforms_active())


def savable(tensor: Tensor) -> Tensor:
    """A copy of a tensor that was made under ``torch.inference_mode``, because no backward may keep such a tensor."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def check_installed(backend: str) -> None:
    if backend == "triton" and not HAS_TRITON:
        raise RuntimeError("backend 'triton': Triton is not installed; pip install 'triton>=3.5' gets it")
    if backend == "cuda" and native.cuda is None:
        raise RuntimeError("backend 'cuda': irlfast._cuda is not built; pip install irlfast again where there is nvcc")


def emulated(backend: str) -> bool:
    """Return whether the backend's kernels run on CPU tensors."""
    return INTERPRETED if backend == "triton" else native.cuda.device == "cpu"


# ---------------------------------------------------------------- tokens and sequences


def check_offsets(cu_seqlens: Tensor, device: torch.device) -> None:
    check_tensor(cu_seqlens, "cu_seqlens", "[S + 1]", (torch.int32,), device)
    require(cu_seqlens.numel() > 0, "cu_seqlens", cu_seqlens, "[S + 1], at least the 0 that it starts with")


def check_scaling(scale: float, softcap: float | None, prefix: str = "") -> None:
    require(isinstance(scale, Real) and -math.inf < scale < math.inf, f"{prefix}logit_scale", scale, "a number")
    if softcap is not None:
        check_positive(softcap, f"{prefix}logit_softcap", "None or a number > 0")


def values_visible(tensor: Tensor) -> bool:
    """Return whether the values of this tensor are checked."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or is_batchedtensor(tensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("IRLFAST_CHECK") == "1"


def check_targets(targets: Tensor, vocabulary: int) -> None:
    if values_visible(targets):
        check_range(targets[targets != IGNORE], "targets", 0, vocabulary, f", or {IGNORE} where skipped")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, whose: str) -> None:
    if not values_visible(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    require(first == 0, "cu_seqlens[0]", first, "0")
    require(last == tokens, "cu_seqlens[-1]", last, f"{tokens}, {whose}")
    drop = int(cu_seqlens.diff().min()) if cu_seqlens.numel() > 1 else 0
    require(drop >= 0, "cu_seqlens", f"a step of {drop}", "values that do not decrease")


def check_range(values: Tensor, name: str, low: int, high: int, note: str) -> None:
    if values_visible(values) and values.numel():
        smallest, largest = int(values.min()), int(values.max())
        worst = smallest if smallest < low else largest
        require(low <= smallest and largest < high, name, worst, f"{low} <= value < {high}{note}")


def check_cached(ref_logps: Tensor, device: torch.device, tokens: int, sequences: int) -> None:
    check_tensor(ref_logps, "ref_logps", "[N]", FLOATS, device)
    fits = ref_logps.shape[0] in (tokens, sequences)
    require(fits, "ref_logps", ref_logps, "[{}] (one per token) or [{}] (one per sequence)", tokens, sequences)


# ---------------------------------------------------------------- pairs


def check_pairs(pairs: Tensor | None, cu_seqlens: Tensor) -> None:
    """Check pairs ``[P, 2]`` of sequences; None stands for sequences 2i (expert) and 2i + 1 (synthetic)."""
    sequences = cu_seqlens.shape[0] - 1
    if pairs is None:
        if sequences % 2:
            expected = "an even number of them (expert, synthetic, …) where pairs is None"
            require(False, "cu_seqlens", f"{sequences} sequences", expected)
        return
    check_tensor(pairs, "pairs", "[P, 2]", INTEGERS, cu_seqlens.device)
    require(pairs.shape[1] == 2, "pairs", pairs, "[P, 2], columns expert and synthetic")
    check_range(pairs, "pairs", 0, sequences, ", the sequences of cu_seqlens")
