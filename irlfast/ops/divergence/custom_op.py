"""``token_divergence`` as a custom operation of torch, so that compiled code calls it as a whole.

Its arguments are the flattened fields of records: :class:`HeadInputs` (of the policy, then of the reference) and
:class:`DivergenceSpec`. An output that is not wanted is an empty tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast.ops.common.records import rebuild, schema_of
from irlfast.ops.common.types import HeadInputs
from irlfast.ops.divergence import cpu_rows, slab
from irlfast.ops.divergence.mixtures import DivergenceSpec
from irlfast.ops.pair_loss import cpu_slab
from irlfast.ops.pair_loss.custom_op import by_hidden, filled, needs_gradient, rounded, whole_kernels
from irlfast.ops.pair_loss.slab import new_gradients

ARGUMENTS = f"{schema_of(HeadInputs)}, {schema_of(HeadInputs, prefix='ref_')}, {schema_of(DivergenceSpec)}"
RECORDS = HeadInputs, HeadInputs, DivergenceSpec


def token_divergence(policy: HeadInputs, reference: HeadInputs, spec: DivergenceSpec, backend: str) -> Tensor:
    """See :func:`irlfast.ops.divergence.plain.token_divergence`."""
    keep_slopes = needs_gradient(policy) == [True, False, False]
    values, _ = forward(*policy, *reference, *spec, backend, keep_slopes)
    return values  # type: ignore[no-any-return]


@contextmanager
def divergence_kernels(backend: str, policy: HeadInputs, spec: DivergenceSpec) -> Iterator[slab.DivergenceKernels]:
    with whole_kernels(backend, policy, spec.operands) as products:
        if backend == "triton":
            from irlfast.kernels.divergence import divergence

            yield slab.DivergenceKernels(products, divergence, narrow_slopes=True)
        else:
            products = products._replace(times_weight=cpu_slab.times_weight_in_fp32)
            yield slab.DivergenceKernels(products, cpu_rows.divergence, narrow_slopes=False)


@torch.library.custom_op(
    "irlfast::token_divergence",
    mutates_args=(),
    schema=f"({ARGUMENTS}, str backend, bool keep_slopes) -> (Tensor, Tensor)",
)
def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.divergence.slab.divergences`."""
    policy, reference, spec, backend, keep_slopes = rebuild(arguments, *RECORDS)
    with divergence_kernels(backend, policy, spec) as kernels:
        models = policy.cast(spec.operands), reference.cast(spec.operands)
        return filled(policy, *slab.divergences(kernels, *models, spec, keep_slopes))


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    policy, _, spec, _, keep_slopes = rebuild(arguments, *RECORDS)
    values = policy.hidden.new_empty(slab.num_rows(policy, spec), dtype=spec.dtype)
    return filled(policy, values, values.new_empty(values.shape[0], policy.hidden.shape[1]) if keep_slopes else None)


@torch.library.custom_op(
    "irlfast::token_divergence_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {ARGUMENTS}, str backend, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.divergence.slab.gradients`; each result is in the dtype of its tensor."""
    policy, reference, spec, backend, wanted = rebuild(arguments, *RECORDS)
    with divergence_kernels(backend, policy, spec) as kernels:
        models = policy.cast(spec.operands), reference.cast(spec.operands)
        sums = slab.gradients(kernels, *models, spec, upstream, wanted)
        return filled(policy, *rounded(sums, policy))


@backward.register_fake
def _(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    policy, _, spec, _, wanted = rebuild(arguments, *RECORDS)
    return filled(policy, *rounded(new_gradients(policy, spec.dtype, wanted), policy))


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, reference, spec, ctx.backend, ctx.keep_slopes = rebuild(inputs, *RECORDS)
    _, slopes = output
    ctx.mark_non_differentiable(slopes)
    ctx.height, ctx.dtype = policy.hidden.shape[0], policy.hidden.dtype
    ctx.num_others = len(inputs) - len(policy)
    ctx.spec = spec._replace(rows=None, ref_rows=None)  # without tensors
    inputs_again = (None,) * 6 if ctx.keep_slopes else (*policy, *reference)
    ctx.save_for_backward(slopes, spec.rows, spec.ref_rows, *inputs_again)


@once_differentiable
def differentiate(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    slopes, rows, ref_rows, *inputs = ctx.saved_tensors
    others = [None] * ctx.num_others
    if ctx.keep_slopes:
        return by_hidden(upstream, slopes, rows, ctx.height).to(ctx.dtype), None, None, *others
    spec = ctx.spec._replace(rows=rows, ref_rows=ref_rows)
    wanted = list(ctx.needs_input_grad[: len(HeadInputs._fields)])
    results = backward(upstream, *inputs, *spec, ctx.backend, wanted)
    return *(gradient if wants else None for gradient, wants in zip(results, wanted, strict=True)), *others


forward.register_autograd(differentiate, setup_context=save_forward)
