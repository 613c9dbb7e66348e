"""Log-probability, entropy and log-sum-exp of each token from hidden states, without ``[N, V]`` logits.

The logits of a chunk of tokens lie in a bounded buffer, on which the functions for logits that exist work: see
:mod:`irlfast.ops.logits.statistics_op`. The backward computes the logits again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.logits.statistics_op import factors
from irlfast.ops.pair_loss.slab import (
    Chunk,
    Gradients,
    SlabKernels,
    add_gradients,
    new_buffer,
    new_gradients,
    slab_rows,
)


class StatisticsKernels(NamedTuple):
    products: SlabKernels
    rows: Any  # the module of statistics_op.functions_of
    narrow_slopes: bool  # the products take derivatives in the operands' dtype, not in that of the logits


def token_statistics(
    kernels: StatisticsKernels, policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The policy's log-probabilities, entropies and log-sum-exps, and the reference's log-probabilities, ``[N]``."""
    chunks = statistics_chunks(kernels, policy, scored)
    values = score(kernels, policy, scored, chunks)
    return *values, None if reference is None else score(kernels, reference, scored, chunks)[0]


def score(
    kernels: StatisticsKernels, inputs: HeadInputs, scored: ScoredTokens, chunks: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    buffer = new_buffer(inputs, scored.dtype, [len(tokens) for tokens in chunks])
    results = scored.zeros(), scored.zeros(), scored.zeros()
    for tokens in chunks:
        z = logits(kernels, inputs, scored, tokens, buffer)
        options = scored.targets[tokens], scored.logit_scale, scored.logit_softcap
        for result, value in zip(results, kernels.rows.token_statistics(z, *options), strict=True):
            result[tokens] = value
    return results


def gradients(
    kernels: StatisticsKernels,
    policy: HeadInputs,
    scored: ScoredTokens,
    upstream: tuple[Tensor, Tensor, Tensor],  # [N] by log-probability, entropy and log-sum-exp
    entropies: Tensor,  # [N]
    lses: Tensor,  # [N]
    wanted: Sequence[bool],
) -> Gradients:
    chunks = statistics_chunks(kernels, policy, scored)
    sizes = [len(tokens) for tokens in chunks]
    buffer, sums = new_buffer(policy, scored.dtype, sizes), new_gradients(policy, scored.dtype, wanted)
    if sums.weight is not None and not chunks:
        sums.weight.zero_()
    slopes = new_buffer(policy, scored.operands, sizes) if kernels.narrow_slopes else buffer
    row_factors = torch.stack(factors(*upstream, entropies))
    units = row_factors.abs().amax(0).clamp(min=1e-30)  # without which 16 bits would lose small derivatives
    row_factors = row_factors / units
    for number, tokens in enumerate(chunks):
        z = logits(kernels, policy, scored, tokens, buffer)
        slab = slopes[: len(tokens)]
        scaling = scored.logit_scale, scored.logit_softcap
        kernels.rows.write_gradient(slab, z, scored.targets[tokens], lses[tokens], *row_factors[:, tokens], *scaling)
        rows = scored.rows_of(tokens)
        chunk = Chunk(rows, lses[tokens], policy.hidden[rows], slab, units[tokens, None])
        add_gradients(kernels.products, sums, policy, chunk, torch.ones_like(chunk.logps), new=number == 0)
    return sums


def statistics_chunks(kernels: StatisticsKernels, policy: HeadInputs, scored: ScoredTokens) -> tuple[Tensor, ...]:
    """The scored tokens in chunks, whose logits and narrow derivatives fit the buffer together."""
    share = 2 / 3 if kernels.narrow_slopes else 1
    rows = slab_rows(kernels.products, policy, scored._replace(buffer_mb=share * scored.buffer_mb))
    tokens = scored.indices()
    return tokens.split(rows) if len(tokens) else ()


def logits(
    kernels: StatisticsKernels, inputs: HeadInputs, scored: ScoredTokens, tokens: Tensor, buffer: Tensor
) -> Tensor:
    """Logits ``[n, V]`` before scale and soft-cap."""
    z = buffer[: len(tokens)]
    kernels.products.logits(inputs.hidden[scored.rows_of(tokens)], inputs.weight, z)
    if inputs.bias is not None:
        z += inputs.bias.to(z.dtype)
    return z
