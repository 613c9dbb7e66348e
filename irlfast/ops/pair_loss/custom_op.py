"""``log_ratio`` and ``pair_loss`` as custom operations of torch, so that compiled code calls each as a whole.

Their arguments are the flattened fields of records: :class:`HeadInputs` (of the policy, then of the reference),
:class:`ScoredTokens`, and :class:`PairLossSpec`. An output that is not wanted is an empty tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast.ops.common.checks import HAS_TRITON
from irlfast.ops.common.precision import fp32_precision
from irlfast.ops.common.records import rebuild, schema_of
from irlfast.ops.common.types import HeadInputs, PairLoss, PairLossSpec, ScoredTokens
from irlfast.ops.pair_loss import cpu_slab, cuda_slab, slab, triton_slab
from irlfast.ops.pair_loss.objective import objective

POLICY = schema_of(HeadInputs)
REFERENCE = schema_of(HeadInputs, prefix="ref_", optional=True)
SCORED = schema_of(ScoredTokens)
SPEC = schema_of(PairLossSpec)
NO_REFERENCE = (None,) * len(HeadInputs._fields)
WAITS = (torch.Tag.cudagraph_unsafe,)  # shapes depend on how many tokens are scored: the host waits for this number


def token_logps(
    policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens, backend: str
) -> tuple[Tensor, Tensor | None]:
    """See :func:`irlfast.ops.pair_loss.plain.token_logps`."""
    keep_slopes = needs_gradient(policy) == [True, False, False]
    logps, ref_logps, _ = forward(*policy, *(reference or NO_REFERENCE), *scored, backend, keep_slopes)
    return logps, scored.ref_logps if reference is None else ref_logps


def pair_loss(
    policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens, spec: PairLossSpec, backend: str
) -> PairLoss:
    """See :func:`irlfast.ops.pair_loss.plain.pair_loss`."""
    hidden, *head = needs_gradient(policy)
    if not any(head) and not (hidden and scored.skip_mass):
        return objective(*token_logps(policy, reference, scored, backend), scored, spec)
    arguments = *policy, *(reference or NO_REFERENCE), *scored, *spec, backend, needs_gradient(policy)
    slabs = pair_slabs if spec.is_named() else compute_slabs  # a function neither passes a schema nor is traced
    with torch.no_grad():
        logps, ref_logps, *sums = slabs(*arguments)
        result = objective(logps, scored.ref_logps if reference is None else ref_logps, scored, spec)
    loss = PrecomputedGradient.apply(result.loss, *policy, *sums)  # type: ignore[no-untyped-call]
    return result._replace(loss=loss)


def needs_gradient(policy: HeadInputs) -> list[bool]:
    """Return whether hidden, weight and bias need a gradient."""
    return [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in policy]


def unpack(arguments: Sequence[Any], *records: Any) -> list[Any]:
    """Policy, reference or None, scored tokens, further ``records``, and the other arguments."""
    policy, reference, *rest = rebuild(arguments, HeadInputs, HeadInputs, ScoredTokens, *records)
    return [policy, None if reference.hidden is None else reference, *rest]


@contextmanager
def kernels_of(backend: str, policy: HeadInputs, scored: ScoredTokens) -> Iterator[slab.SlabKernels]:
    """The kernels of a backend, for a whole or a split vocabulary."""
    with whole_kernels(backend, policy, scored.operands) as kernels:
        if scored.group is not None:
            from irlfast.ops.pair_loss import sharded

            yield sharded.kernels_for(kernels, scored)
        else:
            yield triton_slab.EPILOGUE if backend == "triton" and triton_slab.takes_epilogue(scored) else kernels


@contextmanager
def whole_kernels(backend: str, policy: HeadInputs, operands: torch.dtype) -> Iterator[slab.SlabKernels]:
    """The kernels of a backend, on the policy's device. fp32 operands are multiplied as such."""
    hidden = policy.hidden
    narrow = operands == torch.bfloat16  # cpu_slab.NARROW sets the precision of each product by itself
    products = nullcontext() if narrow else fp32_precision("cuda" if hidden.is_cuda else "mkldnn", "ieee")
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden), products:
        on_gpu = {"triton": triton_slab.KERNELS, "cuda": cuda_slab.KERNELS}
        yield on_gpu[backend] if backend in on_gpu else cpu_slab.kernels(operands)


def finite(kernels: slab.SlabKernels, compute: Callable[[slab.SlabKernels], tuple[Any, ...]]) -> tuple[Any, ...]:
    """The result of ``compute``, whose first two are log-probabilities; by other kernels where those overflow."""
    result = compute(kernels)
    if kernels.otherwise and not all(logps is None or logps.isfinite().all() for logps in result[:2]):
        del result  # its memory
        result = compute(kernels.otherwise)
    return result


def cast(inputs: HeadInputs | None, scored: ScoredTokens) -> Any:
    return None if inputs is None else inputs.cast(scored.operands)


def rounded(sums: slab.Gradients, policy: HeadInputs) -> list[Tensor | None]:
    """The sums, each in the dtype of the tensor that it is the gradient of."""
    pairs: Any = zip(sums, policy, strict=True)
    return [None if total is None else total.to(tensor.dtype) for total, tensor in pairs]


def filled(policy: HeadInputs, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors, with an empty one in the place of None."""
    return tuple(policy.hidden.new_empty(0) if tensor is None else tensor for tensor in tensors)


# ---------------------------------------------------------------- log-probabilities of tokens, for any loss


@torch.library.custom_op(
    "irlfast::token_logps",
    mutates_args=(),
    schema=f"({POLICY}, {REFERENCE}, {SCORED}, str backend, bool keep_slopes) -> (Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.pair_loss.slab.token_logps`."""
    policy, reference, scored, backend, keep_slopes = unpack(arguments)
    with kernels_of(backend, policy, scored) as kernels:
        models = cast(policy, scored), cast(reference, scored)
        return filled(policy, *finite(kernels, lambda by: slab.token_logps(by, *models, scored, keep_slopes)))


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    policy, reference, scored, _, keep_slopes = unpack(arguments)
    logps, tokens = scored.zeros(), scored.targets.shape[0]
    ref_logps = None if reference is None else scored.zeros()
    if keep_slopes:
        return filled(policy, logps, ref_logps, logps.new_empty(tokens, policy.hidden.shape[1]))
    return filled(policy, logps, ref_logps, None)


@torch.library.custom_op(
    "irlfast::token_logps_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {POLICY}, {REFERENCE}, {SCORED}, str backend, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.pair_loss.slab.gradients`; each result is in the dtype of its tensor."""
    policy, _, scored, backend, wanted = unpack(arguments)
    with kernels_of(backend, policy, scored) as kernels:
        sums = slab.gradients(kernels.otherwise or kernels, cast(policy, scored), scored, upstream, wanted)
        return filled(policy, *rounded(sums, policy))


@backward.register_fake
def _(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    policy, _, scored, _, wanted = unpack(arguments)
    return filled(policy, *rounded(slab.new_gradients(policy, scored.dtype, wanted), policy))


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, _, scored, ctx.backend, ctx.keep_slopes = unpack(inputs)
    _, ref_logps, kept = output
    ctx.mark_non_differentiable(ref_logps, kept)
    ctx.height, ctx.dtype = policy.hidden.shape[0], policy.hidden.dtype
    ctx.num_others = len(inputs) - len(policy)
    ctx.scored = scored.without_tensors()
    needed = NO_REFERENCE if ctx.keep_slopes else policy
    ctx.save_for_backward(kept, scored.targets, scored.rows, scored.sequence_ids, *needed)


@once_differentiable
def differentiate(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    kept, targets, rows, sequence_ids, *policy = ctx.saved_tensors
    others = [None] * ctx.num_others
    if ctx.keep_slopes:
        return by_hidden(upstream, kept, rows, ctx.height).to(ctx.dtype), None, None, *others
    scored = ctx.scored._replace(targets=targets, rows=rows, sequence_ids=sequence_ids)
    wanted = list(ctx.needs_input_grad[: len(policy)])
    gradients = backward(upstream, *policy, *NO_REFERENCE, *scored, ctx.backend, wanted)
    return *(gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)), *others


def by_hidden(upstream: Tensor, slopes: Tensor, rows: Tensor | None, height: int) -> Tensor:
    """The gradient ``[R, H]`` by hidden, from the derivatives ``[N, H]`` that the forward of a frozen head kept."""
    d_hidden = upstream[:, None] * slopes
    if rows is None:
        return d_hidden
    return d_hidden.new_zeros(height, d_hidden.shape[1]).index_add(0, rows, d_hidden)


forward.register_autograd(differentiate, setup_context=save_forward)


# ---------------------------------------------------------------- the pair slab


def compute_slabs(*arguments: Any) -> tuple[Tensor, ...]:
    """The results of :func:`irlfast.ops.pair_loss.slab.pair_loss`, and the loss's gradients."""
    policy, reference, scored, spec, backend, wanted = unpack(arguments, PairLossSpec)
    with kernels_of(backend, policy, scored) as kernels:
        models = cast(policy, scored), cast(reference, scored)
        return filled(policy, *finite(kernels, lambda by: slab.pair_loss(by, *models, scored, spec, wanted)))


pair_slabs = torch.library.custom_op(
    "irlfast::pair_slabs",
    compute_slabs,
    mutates_args=(),
    schema=f"({POLICY}, {REFERENCE}, {SCORED}, {SPEC}, str backend, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)


@pair_slabs.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    policy, reference, scored, _, _, wanted = unpack(arguments, PairLossSpec)
    ref_logps = None if reference is None else scored.zeros()
    return filled(policy, scored.zeros(), ref_logps, *slab.new_gradients(policy, scored.dtype, wanted))


class PrecomputedGradient(torch.autograd.Function):
    """A loss whose gradients by hidden, weight and bias were computed with it: the backward multiplies them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *sums: Tensor) -> Tensor:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.save_for_backward(*sums)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            scaled(sums, upstream, dtype) if wants else None
            for sums, dtype, wants in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True)
        ]
        return None, *gradients, None, None, None


def scaled(sums: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``sums · factor``, rounded once to ``dtype``, without a tensor in between; a factor of 1 is free on a CPU."""
    concrete = type(factor) is Tensor and not torch.compiler.is_compiling()  # not the tensor of a tracer
    # A GPU is not asked for its factor: the host would wait for it.
    if concrete and factor.is_cuda and HAS_TRITON and sums.dtype == factor.dtype == torch.float32:
        from irlfast.kernels.scale import scaled as kernel

        with torch.cuda.device_of(sums):
            return kernel(sums, factor, dtype)
    if not concrete or factor.device.type != "cpu":
        return torch.mul(sums, factor, out=torch.empty_like(sums, dtype=dtype))
    if factor == 1:
        return sums.to(dtype)
    out = torch.empty_like(sums, dtype=dtype)
    # A CPU multiplies, and then copies the product that it casts: a few rows at a time, so that the copy is small.
    for part, rows in zip(out.split(4096), sums.split(4096), strict=True):
        torch.mul(rows, factor, out=part)
    return out
