"""Checks of the arguments of ``irlfast.ops``: every error names the argument, what was found and what was expected.

Shapes, dtypes and devices are always checked; values where that costs no synchronisation, that is on CPU tensors,
and on others where the environment has ``IRLFAST_CHECK=1``.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from irlfast import native
from irlfast.ops.common.types import IGNORE, HeadInputs, ScoredTokens, sequence_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "plain", "cpu", "triton", "cuda")
ON_GPU = ("triton", "cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton's kernels run on CPU tensors


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r}" if value is None or isinstance(value, Real | str) else type(value).__name__
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"


def require(holds: bool, name: str, found: Any, expected: str, *sizes: int) -> None:
    """``sizes`` fill the braces of ``expected``, only on failure: torch.compile takes what it writes for a constant."""
    if not holds:
        raise ValueError(f"{name}: found {describe(found)}, expected {expected.format(*sizes)}")


def check_tensor(value: Any, name: str, shape: str, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """``shape`` as in ``[N, H]``: only the number of dimensions is checked here."""
    dimensions = shape.count(",") + 1
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    fits = isinstance(value, Tensor) and value.dim() == dimensions and value.dtype in dtypes
    require(fits and value.device == device, name, value, f"{shape} {names} on {device}")


def check_positive(value: Any, name: str, expected: str = "a number > 0") -> None:
    number = isinstance(value, Real)
    require(number and 0 < value < math.inf, name, value, expected)


def choose_backend(backend: str, tensor: Tensor, name: str, backends: Sequence[str] = BACKENDS) -> str:
    """One of ``backends`` that computes with ``tensor``, the argument ``name``; ``"auto"`` takes the best that can.

    Raises:
        ValueError: no such backend, or not for this tensor's device or dtype.
        RuntimeError: ``"triton"`` without Triton, ``"cuda"`` without the native module.
    """
    kind, double = tensor.device.type, tensor.dtype == torch.float64
    if backend == "auto":
        return "cpu" if kind == "cpu" else "triton" if HAS_TRITON and kind == "cuda" and not double else "plain"
    *most, last = map(repr, backends)
    require(backend in backends, "backend", backend, f"{', '.join(most)} or {last}")
    if backend == "cpu":
        require(kind == "cpu", name, tensor, "a tensor on the CPU, by backend 'cpu'")
    if backend in ON_GPU:
        check_installed(backend)
        runs = kind == "cuda" or (kind == "cpu" and emulated(backend))
        hint = " (or TRITON_INTERPRET=1)" if backend == "triton" else ""
        require(runs, name, tensor, f"a tensor on a GPU{hint}, by backend '{backend}'")
        require(not double, name, tensor, f"float32, bfloat16 or float16, by backend '{backend}'")
    return backend


def check_installed(backend: str) -> None:
    if backend == "triton" and not HAS_TRITON:
        raise RuntimeError("backend 'triton': Triton is not installed; pip install 'triton>=3.5' gets it")
    if backend == "cuda" and native.cuda is None:
        raise RuntimeError("backend 'cuda': irlfast._cuda is not built; pip install irlfast again where there is nvcc")


def emulated(backend: str) -> bool:
    """Whether the backend's kernels run on CPU tensors."""
    return INTERPRETED if backend == "triton" else native.cuda.device == "cpu"


# ---------------------------------------------------------------- policy and reference


def check_policy(policy: HeadInputs) -> HeadInputs:
    check_side(policy, "", getattr(policy.hidden, "device", torch.device("cpu")))
    return policy


def check_reference(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, policy: HeadInputs
) -> HeadInputs | None:
    """The reference that is computed from hidden states, detached; None without ``ref_hidden``."""
    if hidden is None:
        require(weight is None, "ref_weight", weight, "None where ref_hidden is None")
        require(bias is None, "ref_bias", bias, "None where ref_hidden is None")
        return None
    if weight is None:
        raise ValueError("ref_weight: found None, expected a tensor [V, H'] where ref_hidden is given")
    check_side(HeadInputs(hidden, weight, bias), "ref_", policy.hidden.device)
    rows, vocabulary = policy.hidden.shape[0], policy.weight.shape[0]
    require(hidden.shape[0] == rows, "ref_hidden", hidden, "{} rows, as hidden has", rows)
    require(weight.shape[0] == vocabulary, "ref_weight", weight, "{} rows, as weight has", vocabulary)
    return HeadInputs(hidden.detach(), weight.detach(), None if bias is None else bias.detach())


def check_side(side: HeadInputs, prefix: str, device: torch.device) -> None:
    hidden, weight, bias = side
    check_tensor(hidden, f"{prefix}hidden", "[R, H]", FLOATS, device)
    check_tensor(weight, f"{prefix}weight", "[V, H]", (hidden.dtype,), device)
    size, columns = weight.shape[0], hidden.shape[1]
    fits = size > 0 and weight.shape[1] == columns
    require(fits, f"{prefix}weight", weight, f"[V, {{}}] with V > 0, as {prefix}hidden has H columns", columns)
    if bias is not None:
        check_tensor(bias, f"{prefix}bias", "[V]", (hidden.dtype,), device)
        require(bias.shape[0] == size, f"{prefix}bias", bias, f"[{{}}], as {prefix}weight has that many rows", size)


def check_ref_logps(ref_logps: Tensor | None, has_ref_hidden: bool, scored: ScoredTokens) -> ScoredTokens:
    """The problem with its cached reference, per token ``[N]`` or per sequence ``[S]``, detached."""
    if ref_logps is None:
        return scored
    require(not has_ref_hidden, "ref_logps", ref_logps, "None where ref_hidden is given (one reference, not two)")
    check_cached(ref_logps, scored.targets.device, scored.targets.shape[0], scored.sequences)
    return scored._replace(ref_logps=ref_logps.detach())


def check_cached(ref_logps: Tensor, device: torch.device, tokens: int, sequences: int) -> None:
    check_tensor(ref_logps, "ref_logps", "[N]", FLOATS, device)
    fits = ref_logps.shape[0] in (tokens, sequences)
    require(fits, "ref_logps", ref_logps, "[{}] (one per token) or [{}] (one per sequence)", tokens, sequences)


# ---------------------------------------------------------------- tokens and sequences


def check_scored(
    policy: HeadInputs,
    targets: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    buffer_mb: float,
    skip_mass: float,
) -> ScoredTokens:
    """What is scored, with ``cu_seqlens`` turned into the sequence of each target."""
    hidden, device = policy.hidden, policy.hidden.device
    check_tensor(targets, "targets", "[N]", INTEGERS, device)
    check_offsets(cu_seqlens, device)
    tokens = targets.numel()
    if rows is None:
        require(hidden.shape[0] == tokens, "hidden", hidden, "{} rows, as targets, where rows is None", tokens)
    else:
        check_tensor(rows, "rows", "[N]", INTEGERS, device)
        require(rows.numel() == tokens, "rows", rows, "[{}], as targets", tokens)
    check_scaling(logit_scale, logit_softcap)
    check_positive(buffer_mb, "buffer_mb")
    number = isinstance(skip_mass, Real)
    require(number and 0 <= skip_mass < 1, "skip_mass", skip_mass, "a number >= 0 and < 1")
    if values_visible(device):
        check_values(targets, cu_seqlens, rows, hidden.shape[0], policy.weight.shape[0])
    return ScoredTokens(
        targets.long(),
        None if rows is None else rows.long(),
        sequence_of(cu_seqlens, tokens),
        cu_seqlens.numel() - 1,
        float(logit_scale),
        logit_softcap,
        torch.promote_types(hidden.dtype, torch.float32),
        buffer_mb,
        skip_mass,
    )


def check_offsets(cu_seqlens: Tensor, device: torch.device) -> None:
    check_tensor(cu_seqlens, "cu_seqlens", "[S + 1]", (torch.int32,), device)
    require(cu_seqlens.numel() > 0, "cu_seqlens", cu_seqlens, "[S + 1], at least the 0 that it starts with")


def check_scaling(scale: float, softcap: float | None) -> None:
    require(isinstance(scale, Real) and -math.inf < scale < math.inf, "logit_scale", scale, "a number")
    if softcap is not None:
        check_positive(softcap, "logit_softcap", "None or a number > 0")


def values_visible(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("IRLFAST_CHECK") == "1"


def check_values(targets: Tensor, cu_seqlens: Tensor, rows: Tensor | None, height: int, vocabulary: int) -> None:
    check_cu_seqlens(cu_seqlens, targets.numel(), "the number of targets")
    check_range(targets[targets != IGNORE], "targets", 0, vocabulary, f", or {IGNORE} where skipped")
    if rows is not None:
        check_range(rows, "rows", 0, height, ", the rows of hidden")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, whose: str) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    require(first == 0, "cu_seqlens[0]", first, "0")
    require(last == tokens, "cu_seqlens[-1]", last, f"{tokens}, {whose}")
    drop = int(cu_seqlens.diff().min()) if cu_seqlens.numel() > 1 else 0
    require(drop >= 0, "cu_seqlens", f"a step of {drop}", "values that do not decrease")


def check_range(values: Tensor, name: str, low: int, high: int, note: str) -> None:
    if values.numel():
        smallest, largest = int(values.min()), int(values.max())
        found = smallest if smallest < low else largest
        require(low <= smallest and largest < high, name, found, f"{low} <= value < {high}{note}")


# ---------------------------------------------------------------- pairs


def check_pairs(pairs: Tensor | None, cu_seqlens: Tensor) -> None:
    """Pairs ``[P, 2]`` of its sequences; None stands for sequences 2i (expert) and 2i + 1 (synthetic)."""
    sequences = cu_seqlens.shape[0] - 1
    if pairs is None:
        if sequences % 2:
            expected = "an even number of them (expert, synthetic, …) where pairs is None"
            require(False, "cu_seqlens", f"{sequences} sequences", expected)
        return
    check_tensor(pairs, "pairs", "[P, 2]", INTEGERS, cu_seqlens.device)
    require(pairs.shape[1] == 2, "pairs", pairs, "[P, 2], columns expert and synthetic")
    if values_visible(cu_seqlens.device):
        check_range(pairs, "pairs", 0, sequences, ", the sequences of cu_seqlens")


def check_weight_grad(weight_grad: Tensor, policy: HeadInputs, scored: ScoredTokens) -> None:
    check_tensor(weight_grad, "weight_grad", "[V, H]", (scored.dtype,), policy.hidden.device)
    fits = weight_grad.shape == policy.weight.shape and weight_grad.is_contiguous() and not weight_grad.requires_grad
    height, width = policy.weight.shape
    require(fits, "weight_grad", weight_grad, "[{}, {}], as weight has, contiguous, without a gradient", height, width)
    require(scored.skip_mass == 0, "skip_mass", scored.skip_mass, "0 where weight_grad is given")


def check_loss(
    beta: float, loss_type: str, nll_weight: float, num_pairs: float | None, num_tokens: float | None
) -> None:
    check_positive(beta, "beta")
    require(loss_type in ("sigmoid", "hinge", "linear"), "loss_type", loss_type, "'sigmoid', 'hinge' or 'linear'")
    fits = isinstance(nll_weight, Real) and 0 <= nll_weight < math.inf
    require(fits, "nll_weight", nll_weight, "a number >= 0")
    for name, value in (("num_pairs", num_pairs), ("num_tokens", num_tokens)):
        if value is not None:
            check_positive(value, name, "None or a number > 0")
