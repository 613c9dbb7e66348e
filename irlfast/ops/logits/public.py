"""Log-probabilities of targets, and log-ratios of sequences, from logits that exist already.

Arguments that both operations take; the dimensions are those of :mod:`irlfast.ops.pair_loss.public`:

- ``logits`` ``[N, V]`` in fp32, bf16, fp16 or fp64: row n predicts target n. Rows may be any distance apart in memory.
  Where the elements of a row are not adjacent, all backends but ``"plain"`` take a contiguous copy. Scored is
  ``softcap(logit_scale · logits)``, with ``softcap(z) = c · tanh(z / c)`` where ``logit_softcap`` is c, in fp32 (fp64
  for fp64 logits), with autocast too.
- ``targets`` ``[N]`` int64 or int32; −100 is skipped. On a GPU, where values are not checked, a target outside the
  vocabulary has a log-probability of NaN.
- ``inplace_backward``: write the gradient over ``logits``, so that no second ``[N, V]`` tensor is ever made. The first
  backward destroys the logits: a second raises RuntimeError, and so does the backward of any other operation that saved
  them. Rows must not overlap, and their elements must be adjacent. ``"plain"`` ignores the option, and so does
  ``torch.compile``, which plans memory itself.
- ``backend``: ``"plain"`` is the oracle, and makes several ``[N, V]`` tensors. ``"cpu"`` takes a few rows at a time; in
  fp32 and bf16, where installation built ``irlfast._cpu``, it reads each row once and makes no such tensor.
  ``"triton"`` and ``"cuda"`` (our own CUDA C++, where installation built it) read each row once, on a GPU, in fp32,
  bf16 or fp16. ``"auto"`` takes ``"cpu"`` for CPU tensors and ``"triton"`` for CUDA tensors where it can, else
  ``"plain"``. Only ``"plain"`` works inside transformations of torch.func and has forward-mode and second derivatives.

The gradient has the dtype of ``logits``. It is zero where the target is skipped or the upstream gradient is zero.
"""

import torch
from torch import Tensor

from irlfast.ops.common.checks import ON_GPU, STATISTICS_BACKENDS, alternatives, require, savable
from irlfast.ops.common.sequences import log_ratios, sequence_ids
from irlfast.ops.common.types import LogRatio, TokenStatistics
from irlfast.ops.logits import custom_op, plain, statistics_op
from irlfast.ops.logits.checks import check_logits, check_reference, check_sequences, is_adjacent


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

    See the module for the arguments.

    Returns:
        Tensor: ``[N]`` fp32 (fp64 for fp64 logits), differentiable in ``logits``; 0 where the target is −100.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names the argument.
        RuntimeError: the backend is not installed.
    """
    backend = check_logits(logits, targets, logit_scale, logit_softcap, inplace_backward, backend)
    targets = savable(targets)
    return score(logits, targets, None, logit_scale, logit_softcap, inplace_backward, backend)[0]


def token_statistics(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenStatistics:
    """Log-probability of every target, and entropy and log-sum-exp of its row, in one pass over the logits.

    The squared log-sum-exp is the z-loss (PaLM, arXiv 2204.02311, section 5). See the module for the arguments;
    ``backend`` is not ``"cuda"``, and ``"cpu"`` is PyTorch.

    Returns:
        TokenStatistics: ``token_logps``, ``entropy`` and ``lse`` ``[N]`` fp32 (fp64 for fp64 logits), all
        differentiable in ``logits``; 0 where the target is −100.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names the argument.
        RuntimeError: the backend is not installed.
    """
    require(backend != "cuda", "backend", backend, alternatives(STATISTICS_BACKENDS))
    backend = check_logits(logits, targets, logit_scale, logit_softcap, inplace_backward, backend)
    targets = savable(targets)
    if backend == "plain":
        with torch.autocast(logits.device.type, enabled=False):
            return TokenStatistics(*plain.token_statistics(logits, targets, logit_scale, logit_softcap))
    inplace = inplace_backward and not torch.compiler.is_compiling()
    return TokenStatistics(
        *statistics_op.forward(adjacent(logits), targets, float(logit_scale), logit_softcap, inplace, backend)
    )


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
    """Log-ratio ρ(y|x) = Σ_t log π_θ(y_t) − log π_ref(y_t) of every sequence; the sums are in fp64, and lose nothing.

    β·ρ is the implicit reward of IRFT (arXiv 2405.17888) and SPIN (arXiv 2401.01335).

    See the module for the arguments. Further ones:

    - ``cu_seqlens`` ``[S + 1]`` int32: sequence s is ``targets[cu_seqlens[s]:cu_seqlens[s + 1]]``; it may be empty.
      On a GPU, where values are not checked, the results for offsets that decrease, or that do not go from 0 to N, are
      undefined; no token that does not exist is read.
    - The reference never has gradients. It is one of: nothing; ``ref_logits`` ``[N, V]`` of any floating dtype, with
      the policy's scale and soft-cap; or ``ref_logps``, log-probabilities per token ``[N]`` (exact) or per sequence
      ``[S]`` (loses ~1e-3 nats at 1,024 tokens). A size that is both N and S is read as per token.

    Returns:
        LogRatio: ``log_ratio``, ``policy_logps``, ``ref_logps`` ``[S]`` and ``token_logps`` ``[N]`` in fp32 (fp64);
        all but ``ref_logps`` carry gradients to ``logits``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names the argument.
        RuntimeError: the backend is not installed.
    """
    backend = check_logits(logits, targets, logit_scale, logit_softcap, inplace_backward, backend)
    targets = savable(targets)
    check_sequences(logits, targets, cu_seqlens)
    check_reference(logits, cu_seqlens, ref_logits, ref_logps)
    logps, computed = score(logits, targets, ref_logits, logit_scale, logit_softcap, inplace_backward, backend)
    reference = computed if ref_logps is None else ref_logps.detach()
    if backend in ON_GPU:
        log_ratio, policy, ref = custom_op.sequence_sums(logps, targets, cu_seqlens, reference, backend).unbind()
        return LogRatio(log_ratio, policy, ref.detach(), logps)
    ids = sequence_ids(cu_seqlens, targets.numel())
    return log_ratios(logps, reference, targets, ids, cu_seqlens.numel() - 1)


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
            logps = plain.token_logps(logits, targets, scale, softcap)
            if ref_logits is None:
                return logps, None
            return logps, plain.token_logps(ref_logits, targets, scale, softcap).to(logps.dtype)
    inplace = inplace and not torch.compiler.is_compiling()
    logits, ref_logits = adjacent(logits), None if ref_logits is None else adjacent(ref_logits)
    logps, _, ref_logps = custom_op.forward(logits, targets, ref_logits, scale, softcap, inplace, backend)
    return logps, None if ref_logits is None else ref_logps


def adjacent(logits: Tensor) -> Tensor:
    return logits if is_adjacent(logits) else logits.contiguous()
