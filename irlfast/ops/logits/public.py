"""The public operations on logits that exist already: log-probabilities of targets, and log-ratios of sequences.

Arguments that both take, dimensions as in :mod:`irlfast.ops`:

- ``logits`` ``[N, V]`` in fp32, bf16, fp16 or fp64: row n predicts target n. Rows may be any distance apart; a row's
  elements are adjacent in memory. What is scored is ``softcap(logit_scale · logits)``, with
  ``softcap(z) = c · tanh(z / c)`` where ``logit_softcap`` is c, in fp32 (fp64 for fp64 logits), autocast or not.
- ``targets`` ``[N]`` int64 or int32; −100 is skipped. On a GPU, where values are not checked, one outside the
  vocabulary has a log-probability of NaN.
- ``inplace_backward``: write the gradient over ``logits``, so that no second ``[N, V]`` tensor is ever made. The
  logits are destroyed by the first backward, and a second raises RuntimeError; so does the backward of any other
  operation that kept them. ``"plain"`` ignores it, and ``torch.compile``, which plans memory itself.
- ``backend``: ``"plain"`` is the oracle, and makes several ``[N, V]`` tensors; ``"cpu"`` takes a few rows at a time, or
  reads each once and makes none, in fp32 and bf16 where installation built ``irlfast._cpu``; ``"triton"`` and
  ``"cuda"`` (our own CUDA C++, where installation built it) read each row once, on a GPU, in fp32, bf16 or fp16.
  ``"auto"`` takes ``"cpu"`` for CPU tensors and ``"triton"`` for CUDA tensors where it can, else ``"plain"``.

The gradient has the dtype of ``logits``, and is zero where the target is skipped or nothing comes from above.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast import native
from irlfast.ops.common.checks import (
    FLOATS,
    INTEGERS,
    ON_GPU,
    check_cached,
    check_offsets,
    check_range,
    check_scaling,
    check_tensor,
    check_values,
    choose_backend,
    require,
    values_visible,
)
from irlfast.ops.common.types import IGNORE, LogRatio, ScoredTokens, sequence_of, summarise
from irlfast.ops.pair_loss import cpu_slab

CHUNK_BYTES = 2**22  # of logits in fp32 that the cpu backend holds at once


def token_logps(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of every target: ``logits.log_softmax(-1).gather(-1, targets)`` in one pass over the logits.

    Arguments as the module says.

    Returns:
        Tensor: ``[N]`` fp32 (fp64 for fp64 logits), differentiable in ``logits``; 0 where the target is −100.

    Raises:
        ValueError: a wrong shape, dtype, device or value; it names the argument, what was found and expected.
        RuntimeError: a backend that is not installed.
    """
    backend = check_logits(logits, targets, logit_scale, logit_softcap, inplace_backward, backend)
    if values_visible(logits.device):
        check_range(targets[targets != IGNORE], "targets", 0, logits.shape[1], f", or {IGNORE} where skipped")
    return score(logits, targets, None, logit_scale, logit_softcap, inplace_backward, backend)[0]


def logits_log_ratio(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S + 1]
    *,
    ref_logits: Tensor | None = None,  # [N, V]
    ref_logps: Tensor | None = None,  # [N] or [S]
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> LogRatio:
    """Log-ratio ρ(y|x) = Σ_t log π_θ(y_t) − log π_ref(y_t) of every sequence, the implicit reward of IRFT
    (arXiv 2405.17888) and SPIN (arXiv 2401.01335) over β; no digit of a token is lost in the sums, which are in fp64.

    Arguments as the module says, and

    - ``cu_seqlens`` ``[S + 1]`` int32: sequence s is ``targets[cu_seqlens[s]:cu_seqlens[s + 1]]``; it may be empty.
    - The reference, never with gradients, one of: nothing; ``ref_logits`` ``[N, V]`` of any floating dtype, with the
      policy's scale and soft-cap; or ``ref_logps``, log-probabilities per token ``[N]`` (exact) or per sequence
      ``[S]`` (loses ~1e-3 nats at 1,024 tokens). A size that is both N and S is read as per token.

    Returns:
        LogRatio: ``log_ratio``, ``policy_logps``, ``ref_logps`` ``[S]`` and ``token_logps`` ``[N]`` in fp32 (fp64);
        all but ``ref_logps`` carry gradients to ``logits``.

    Raises:
        ValueError: a wrong shape, dtype, device or value; it names the argument, what was found and expected.
        RuntimeError: a backend that is not installed.
    """
    backend = check_logits(logits, targets, logit_scale, logit_softcap, inplace_backward, backend)
    check_sequences(logits, targets, cu_seqlens)
    check_reference(logits, cu_seqlens, ref_logits, ref_logps, backend)
    logps, computed = score(logits, targets, ref_logits, logit_scale, logit_softcap, inplace_backward, backend)
    reference = computed if ref_logps is None else ref_logps.detach()
    if backend in ON_GPU:
        log_ratio, policy, ref = sequence_sums(logps, targets, cu_seqlens, reference, backend).unbind()
        return LogRatio(log_ratio, policy, ref.detach(), logps)
    sequence, sequences = sequence_of(cu_seqlens, targets.numel()), cu_seqlens.numel() - 1
    scored = ScoredTokens(
        targets, None, sequence, sequences, logit_scale, logit_softcap, logps.dtype, buffer_mb=math.inf
    )
    return summarise(logps, reference, scored)


def score(
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities ``[N]`` of the targets: the policy's, differentiable, and the reference's."""
    ref_logits = None if ref_logits is None else ref_logits.detach()
    if backend == "plain":
        with torch.autocast(logits.device.type, enabled=False):
            logps = plain(logits, targets, scale, softcap)
            return logps, None if ref_logits is None else plain(ref_logits, targets, scale, softcap).to(logps.dtype)
    inplace = inplace and not torch.compiler.is_compiling()
    logps, _, ref_logps = forward(logits, targets, ref_logits, scale, softcap, inplace, backend)
    return logps, None if ref_logits is None else ref_logps


# ---------------------------------------------------------------- plain PyTorch: the oracle, and by rows for the CPU


def final_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    scored = (targets != IGNORE).nonzero().flatten()
    logps = final_logits(logits[scored], scale, softcap).log_softmax(-1)
    picked = logps.gather(1, targets[scored, None].long()).squeeze(1)
    return picked.new_zeros(targets.shape).index_put((scored,), picked)


def chunks(rows: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, CHUNK_BYTES // (4 * logits.shape[1])))


def score_by_rows(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    logps = logits.new_zeros(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    for rows in chunks((targets != IGNORE).nonzero().flatten(), logits):
        z = final_logits(logits[rows], scale, softcap)
        logps[rows] = z.log_softmax(-1).gather(1, targets[rows, None].long()).squeeze(1).to(logps.dtype)
    return logps


def write_gradient_by_rows(
    grad: Tensor, logits: Tensor, targets: Tensor, upstream: Tensor, scale: float, softcap: float | None
) -> None:
    wanted = (targets != IGNORE) & (upstream != 0)
    grad.index_fill_(0, (~wanted).nonzero().flatten(), 0)  # a product with 0 would keep the NaN of a skipped row
    for rows in chunks(wanted.nonzero().flatten(), logits):
        z = final_logits(logits[rows], scale, softcap)
        slope = z.softmax(-1).neg_()
        slope[torch.arange(len(rows)), targets[rows].long()] += 1
        if softcap is not None:
            slope *= 1 - (z / softcap) ** 2
        grad[rows] = slope.mul_(scale * upstream[rows, None]).to(grad.dtype)


# ---------------------------------------------------------------- operations that torch knows


def is_native(logits: Tensor) -> bool:
    """Whether the cpu backend takes these natively."""
    return native.cpu is not None and logits.dtype in (torch.float32, torch.bfloat16)


def score_on_cpu(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log-sum-exps ``[N]``; no log-sum-exps where PyTorch does it."""
    if is_native(logits):
        return cpu_slab.token_logps(logits, targets, scale, softcap)
    logps = score_by_rows(logits, targets, scale, softcap)
    return logps, logps.new_empty(0)


def kernels_of(backend: str) -> Any:
    """Where the functions ``token_logps``, ``write_gradient`` and ``sequence_sums`` of a GPU's backend are."""
    if backend == "cuda":
        from irlfast.ops.pair_loss import cuda_slab as cuda

        return cuda
    from irlfast.kernels import logits

    return logits


@torch.library.custom_op("irlfast::logits_forward", mutates_args=())
def forward(
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities ``[N]``; log-sum-exps ``[N]`` where the backend keeps them; the reference's ``[N]``, if any."""
    if backend in ON_GPU:
        with torch.cuda.device_of(logits):
            logps, lse, ref_logps = kernels_of(backend).token_logps(logits, targets, ref_logits, scale, softcap)
    else:
        logps, lse = score_on_cpu(logits, targets, scale, softcap)
        ref_logps = None if ref_logits is None else score_on_cpu(ref_logits, targets, scale, softcap)[0].to(logps.dtype)
    return logps, lse, logps.new_empty(0) if ref_logps is None else ref_logps


@forward.register_fake
def _(logits: Tensor, targets: Tensor, ref_logits: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    logps = logits.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    lse = torch.empty_like(logps) if rest[-1] in ON_GPU or is_native(logits) else logps.new_empty(0)
    return logps, lse, logps.new_empty(0) if ref_logits is None else torch.empty_like(logps)


@torch.library.custom_op("irlfast::logits_write_gradient", mutates_args=("grad",))
def write_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    upstream: Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> None:
    """Into ``grad``, which may be ``logits``: ``upstream · ∂ log-probability / ∂ logits``."""
    if backend in ON_GPU:
        with torch.cuda.device_of(logits):
            kernels_of(backend).write_gradient(grad, logits, targets, lse, upstream, scale, softcap)
    elif lse.numel():
        cpu_slab.write_gradient(grad, logits, targets, lse, upstream, scale, softcap)
    else:
        write_gradient_by_rows(grad, logits, targets, upstream, scale, softcap)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _, ctx.scale, ctx.softcap, ctx.inplace, ctx.backend = inputs
    _, lse, ref_logps = output
    ctx.overwritten = False
    ctx.mark_non_differentiable(lse, ref_logps)
    ctx.save_for_backward(logits, targets, lse)


@once_differentiable
def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.overwritten:
        raise RuntimeError("inplace_backward=True: the first backward wrote over the logits, there is no second")
    logits, targets, lse = ctx.saved_tensors
    ctx.overwritten = ctx.inplace
    grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
    write_gradient(grad, logits, targets, lse, upstream, ctx.scale, ctx.softcap, ctx.backend)
    return grad, None, None, None, None, None, None


forward.register_autograd(backward, setup_context=keep)


@torch.library.custom_op("irlfast::logits_sequence_sums", mutates_args=())
def sequence_sums(logps: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None, backend: str) -> Tensor:
    """Log-ratio, policy's and reference's log-probability ``[3, S]`` of every sequence, on a GPU."""
    with torch.cuda.device_of(logps):
        return kernels_of(backend).sequence_sums(logps, targets, cu_seqlens, ref_logps)


@sequence_sums.register_fake
def _(logps: Tensor, targets: Tensor, cu_seqlens: Tensor, *_: Any) -> Tensor:
    return logps.new_empty(3, cu_seqlens.numel() - 1)


def keep_lengths(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.tokens = inputs[0].numel()
    ctx.save_for_backward(inputs[2].diff())


def spread(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Every token takes what its sequence's log-ratio and log-probability are given."""
    [lengths] = ctx.saved_tensors
    return (upstream[0] + upstream[1]).repeat_interleave(lengths, output_size=ctx.tokens), None, None, None, None


sequence_sums.register_autograd(spread, setup_context=keep_lengths)


# ---------------------------------------------------------------- checks


def check_logits(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, inplace: bool, backend: str
) -> str:
    """The backend, chosen."""
    device = getattr(logits, "device", torch.device("cpu"))
    check_tensor(logits, "logits", "[N, V]", FLOATS, device)
    rows, vocabulary = logits.shape
    require(vocabulary > 0, "logits", logits, "[N, V] with V > 0")
    check_tensor(targets, "targets", "[N]", INTEGERS, device)
    require(targets.numel() == rows, "targets", targets, "[{}], as logits has that many rows", rows)
    check_scaling(scale, softcap)
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
    if values_visible(logits.device):
        check_values(targets, cu_seqlens, None, 0, logits.shape[1])


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
