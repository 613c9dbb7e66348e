"""The operations on hidden states as torch knows them: compiled code calls them whole, autograd has their gradients.

Their arguments are the fields of :class:`HeadInputs` (policy, then reference), :class:`ScoredTokens` and
:class:`PairLossSpec`, one after the other. An output that is not wanted is empty.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast.ops.common.types import HeadInputs, PairLossSpec, ScoredTokens, objective
from irlfast.ops.pair_loss import cpu_slab, cuda_slab, slab, triton_slab

SIDE = "Tensor hidden, Tensor weight, Tensor? bias"
REFERENCE = "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias"
PROBLEM = (
    "Tensor targets, Tensor? rows, Tensor sequence, SymInt sequences, float logit_scale, float? logit_softcap, "
    "ScalarType dtype, float buffer_mb, float skip_mass, Tensor? ref_logps"
)
COUPLING = "Tensor pairs, float beta, str loss_type, float nll_weight, float? num_pairs, float? num_tokens"
NOTHING = (None, None, None)  # in the place of a reference
WAITS = (torch.Tag.cudagraph_unsafe,)  # how many tokens are scored decides on shapes: the host waits for it


def token_logps(
    policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens, backend: str
) -> tuple[Tensor, Tensor | None]:
    """See :func:`irlfast.ops.pair_loss.plain.token_logps`."""
    tiles = triton_slab.tiles(policy) if sparse(policy, scored, backend) else 0
    keep = wanted(policy) == [True, False, False] and not tiles
    logps, ref_logps, _ = forward(*policy, *(reference or NOTHING), *scored, backend, keep, tiles)
    return logps, None if reference is None else ref_logps


def pair_loss(
    policy: HeadInputs,
    reference: HeadInputs | None,
    scored: ScoredTokens,
    spec: PairLossSpec,
    backend: str,
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`irlfast.ops.pair_loss.plain.pair_loss`."""
    if weight_grad is not None:
        policy = policy._replace(weight=policy.weight.detach())
    elif not any(wanted(policy)[1:]) or sparse(policy, scored, backend):
        logps, ref_logps = token_logps(policy, reference, scored, backend)
        return objective(logps, ref_logps, scored, spec), logps.detach(), ref_logps
    arguments = *policy, *(reference or NOTHING), *scored, *spec, backend, wanted(policy)
    with torch.no_grad():
        loss, logps, ref_logps, *sums = pair_slabs(weight_grad, *arguments)
    return PrecomputedGradient.apply(loss, *policy, *sums), logps, None if reference is None else ref_logps


def wanted(policy: HeadInputs) -> list[bool]:
    """Whether hidden, weight and bias need a gradient."""
    return [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in policy]


def sparse(policy: HeadInputs, scored: ScoredTokens, backend: str) -> bool:
    """Whether the gradient may leave out what weighs little; its sums are not deterministic."""
    exact = scored.skip_mass == 0 or torch.are_deterministic_algorithms_enabled()
    return backend == "triton" and any(wanted(policy)) and not exact


def unpack(arguments: Sequence[Any]) -> tuple[HeadInputs, HeadInputs | None, ScoredTokens, Sequence[Any]]:
    reference = None if arguments[3] is None else HeadInputs(*arguments[3:6])
    return HeadInputs(*arguments[:3]), reference, ScoredTokens(*arguments[6:16]), arguments[16:]


@contextmanager
def kernels_of(backend: str, policy: HeadInputs) -> Iterator[slab.SlabKernels]:
    hidden = policy.hidden
    wide = hidden.is_cuda and policy.weight.dtype == torch.float32  # not to be multiplied as TF32
    products = slab.precision("cuda", "ieee") if wide else nullcontext()
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden), products:
        on_gpu = {"triton": triton_slab.KERNELS, "cuda": cuda_slab.KERNELS}
        yield on_gpu[backend] if backend in on_gpu else cpu_slab.kernels(policy)


def filled(policy: HeadInputs, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``tensors``, each empty where it is None."""
    return tuple(policy.hidden.new_empty(0) if tensor is None else tensor for tensor in tensors)


# ---------------------------------------------------------------- token log-probabilities, for any coupling


@torch.library.custom_op(
    "irlfast::token_logps",
    mutates_args=(),
    schema=f"({SIDE}, {REFERENCE}, {PROBLEM}, str backend, bool keep, SymInt tiles) -> (Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.pair_loss.slab.token_logps`."""
    policy, reference, scored, (backend, keep, tiles) = unpack(arguments)
    with kernels_of(backend, policy) as kernels:
        return filled(policy, *slab.token_logps(kernels, policy, reference, scored, keep, tiles))


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    policy, reference, scored, (_, keep, tiles) = unpack(arguments)
    logps, tokens = scored.zeros(), scored.targets.shape[0]
    ref_logps = None if reference is None else scored.zeros()
    if keep:
        return filled(policy, logps, ref_logps, logps.new_empty(tokens, policy.hidden.shape[1]))
    return filled(policy, logps, ref_logps, logps.new_empty(2 + tiles, tokens) if tiles else None)


@torch.library.custom_op(
    "irlfast::token_logps_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor? statistics, {SIDE}, {REFERENCE}, {PROBLEM}, str backend, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def backward(upstream: Tensor, statistics: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.pair_loss.slab.gradients`; in the policy's dtype."""
    policy, _, scored, (backend, wanted) = unpack(arguments)
    with kernels_of(backend, policy) as kernels:
        sums = slab.gradients(kernels, policy, scored, upstream, statistics, wanted)
        return filled(policy, *(None if tensor is None else tensor.to(policy.hidden.dtype) for tensor in sums))


@backward.register_fake
def _(upstream: Tensor, statistics: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    policy, _, scored, (_, wanted) = unpack(arguments)
    sums = slab.new_gradients(policy, scored, wanted)
    return filled(policy, *(None if tensor is None else tensor.to(policy.hidden.dtype) for tensor in sums))


def keep_policy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, _, scored, (ctx.backend, ctx.keep, ctx.tiles) = unpack(inputs)
    _, ref_logps, kept = output
    ctx.mark_non_differentiable(ref_logps, kept)
    targets, rows, sequence, *ctx.scalars, _ = scored
    ctx.height, ctx.dtype = policy.hidden.shape[0], policy.hidden.dtype
    ctx.save_for_backward(kept, *(NOTHING if ctx.keep else policy), targets, rows, sequence)


@once_differentiable
def token_logps_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    kept, *policy, targets, rows, sequence = ctx.saved_tensors
    others = [None] * 16  # what comes after the policy
    if ctx.keep:
        d_hidden = upstream[:, None] * kept
        if rows is not None:
            d_hidden = d_hidden.new_zeros(ctx.height, d_hidden.shape[1]).index_add(0, rows, d_hidden)
        return d_hidden.to(ctx.dtype), None, None, *others
    wanted = list(ctx.needs_input_grad[:3])
    scored = targets, rows, sequence, *ctx.scalars, None
    grads = backward(upstream, kept if ctx.tiles else None, *policy, *NOTHING, *scored, ctx.backend, wanted)
    return *(grad if wants else None for grad, wants in zip(grads, wanted, strict=True)), *others


forward.register_autograd(token_logps_backward, setup_context=keep_policy)


# ---------------------------------------------------------------- the pair slab


@torch.library.custom_op(
    "irlfast::pair_slabs",
    mutates_args=("weight_grad",),
    schema=f"(Tensor(a!)? weight_grad, {SIDE}, {REFERENCE}, {PROBLEM}, {COUPLING}, str backend, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def pair_slabs(weight_grad: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.pair_loss.slab.pair_loss`: what it returns, and the gradients. The weight's is added to
    ``weight_grad`` if there is one."""
    policy, reference, scored, (*spec, backend, wanted) = unpack(arguments)
    sums = slab.new_gradients(policy, scored, wanted)
    into = sums if weight_grad is None else sums._replace(weight=weight_grad)
    with kernels_of(backend, policy) as kernels:
        scores = slab.pair_loss(kernels, policy, reference, scored, PairLossSpec(*spec), into, weight_grad is None)
    return filled(policy, *scores, *sums)


@pair_slabs.register_fake
def _(weight_grad: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    policy, reference, scored, (*_, wanted) = unpack(arguments)
    logps, ref_logps = scored.zeros(), None if reference is None else scored.zeros()
    return filled(policy, logps.new_empty(()), logps, ref_logps, *slab.new_gradients(policy, scored, wanted))


class PrecomputedGradient(torch.autograd.Function):
    """A loss whose gradients by hidden, weight and bias are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *sums: Tensor) -> Tensor:
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*sums)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[1:4], strict=True)
        return None, *(scaled(sums, upstream, ctx.dtype) if wants else None for sums, wants in pairs), None, None, None


def scaled(sums: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Their product, rounded once to ``dtype`` without a tensor in between; on a CPU, a factor of 1 takes none."""
    known = type(factor) is Tensor and not torch.compiler.is_compiling()  # no tracer's
    if known and factor.device.type == "cpu" and sums.dtype == dtype and factor == 1:  # to ask a GPU is to wait for it
        return sums
    return torch.mul(sums, factor, out=torch.empty_like(sums, dtype=dtype))
