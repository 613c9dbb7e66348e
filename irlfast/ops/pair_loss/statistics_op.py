"""The statistics of tokens of ``log_ratio`` as a custom operation of torch; arguments as in ``custom_op.py``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.logits.statistics_op import functions_of
from irlfast.ops.pair_loss import cpu_slab, slab, statistics
from irlfast.ops.pair_loss.custom_op import (
    NO_REFERENCE,
    POLICY,
    REFERENCE,
    SCORED,
    WAITS,
    cast,
    filled,
    rounded,
    unpack,
    whole_kernels,
)


def token_statistics(
    policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See :func:`irlfast.ops.pair_loss.plain.token_statistics`."""
    *values, ref_logps = forward(*policy, *(reference or NO_REFERENCE), *scored, backend)
    return *values, scored.ref_logps if reference is None else ref_logps


@contextmanager
def statistics_kernels(
    backend: str, policy: HeadInputs, scored: ScoredTokens
) -> Iterator[statistics.StatisticsKernels]:
    with whole_kernels(backend, policy, scored.operands) as products:
        if backend == "cpu":
            products = products._replace(times_weight=cpu_slab.times_weight_in_fp32)
        yield statistics.StatisticsKernels(products, functions_of(backend), narrow_slopes=backend == "triton")


@torch.library.custom_op(
    "irlfast::token_statistics",
    mutates_args=(),
    schema=f"({POLICY}, {REFERENCE}, {SCORED}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.pair_loss.statistics.token_statistics`."""
    policy, reference, scored, backend = unpack(arguments)
    with statistics_kernels(backend, policy, scored) as kernels:
        models = cast(policy, scored), cast(reference, scored)
        return filled(policy, *statistics.token_statistics(kernels, *models, scored))


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    policy, reference, scored, _ = unpack(arguments)
    return filled(policy, *(scored.zeros() for _ in range(3)), None if reference is None else scored.zeros())


@torch.library.custom_op(
    "irlfast::token_statistics_backward",
    mutates_args=(),
    schema="(Tensor by_logp, Tensor by_entropy, Tensor by_lse, Tensor entropies, Tensor lses, "
    f"{POLICY}, {REFERENCE}, {SCORED}, str backend, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def backward(
    by_logp: Tensor, by_entropy: Tensor, by_lse: Tensor, entropies: Tensor, lses: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """See :func:`irlfast.ops.pair_loss.statistics.gradients`; each result is in the dtype of its tensor."""
    policy, _, scored, backend, wanted = unpack(arguments)
    upstream = by_logp, by_entropy, by_lse
    with statistics_kernels(backend, policy, scored) as kernels:
        sums = statistics.gradients(kernels, cast(policy, scored), scored, upstream, entropies, lses, wanted)
        return filled(policy, *rounded(sums, policy))


@backward.register_fake
def _(by_logp: Tensor, by_entropy: Tensor, by_lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    policy, _, scored, _, wanted = unpack(arguments[2:])
    return filled(policy, *rounded(slab.new_gradients(policy, scored.dtype, wanted), policy))


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, _, scored, ctx.backend = unpack(inputs)
    _, entropies, lses, ref_logps = output
    ctx.mark_non_differentiable(ref_logps)
    ctx.num_others = len(inputs) - len(policy)
    ctx.scored = scored.without_tensors()
    ctx.save_for_backward(entropies, lses, scored.targets, scored.rows, scored.sequence_ids, *policy)


@once_differentiable
def differentiate(
    ctx: Any, by_logp: Tensor, by_entropy: Tensor, by_lse: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    entropies, lses, targets, rows, sequence_ids, *policy = ctx.saved_tensors
    scored = ctx.scored._replace(targets=targets, rows=rows, sequence_ids=sequence_ids)
    wanted = list(ctx.needs_input_grad[: len(policy)])
    arguments = *policy, *NO_REFERENCE, *scored, ctx.backend, wanted
    results = backward(by_logp, by_entropy, by_lse, entropies, lses, *arguments)
    gradients = (gradient if wants else None for gradient, wants in zip(results, wanted, strict=True))
    return *gradients, *[None] * ctx.num_others


forward.register_autograd(differentiate, setup_context=save_forward)
