"""Divergences of rows in chunks: the logits of policy and reference lie in a bounded buffer, and nowhere else.

Once both are there, the divergence of each row is known, and its derivatives are written over the policy's logits: the
slab of :mod:`irlfast.ops.pair_loss.slab`, whose products with the weight give the gradients.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.types import HeadInputs
from irlfast.ops.divergence import top_k
from irlfast.ops.divergence.mixtures import DivergenceSpec
from irlfast.ops.pair_loss.slab import (
    SLAB_ROWS,
    Chunk,
    Gradients,
    SlabKernels,
    add_gradients,
    new_buffer,
    new_gradients,
)


class DivergenceKernels(NamedTuple):
    """The work on one chunk, as one kind of machine does it best."""

    products: SlabKernels
    rows: Callable[..., tuple[Tensor, Tensor, Tensor]]  # irlfast.ops.divergence.cpu_rows.divergence is one
    narrow_slopes: bool  # the products take derivatives in the operands' dtype, not in that of the logits


def divergences(
    kernels: DivergenceKernels, policy: HeadInputs, reference: HeadInputs, spec: DivergenceSpec, keep_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergences ``[N]``; with ``keep_slopes``, also their derivatives ``[N, H]`` by the policy's hidden rows."""
    parts = in_parts(kernels, policy, spec)
    buffers = [new_buffer(policy, spec.dtype, [len(part) for part in parts]) for _ in range(2)]
    values = policy.hidden.new_zeros(num_rows(policy, spec), dtype=spec.dtype)
    slopes = values.new_zeros(len(values), policy.hidden.shape[1]) if keep_slopes else None
    for part in parts:
        chunk = compute(kernels, policy, reference, spec, part, buffers, keep_slopes)
        values[part] = chunk.logps
        if slopes is not None:
            slopes[part] = kernels.products.times_weight(chunk.slab, policy.weight).mul_(chunk.v)
    return values, slopes


def gradients(
    kernels: DivergenceKernels,
    policy: HeadInputs,
    reference: HeadInputs,
    spec: DivergenceSpec,
    upstream: Tensor,  # [N]
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients by the policy. The chunks are computed again."""
    parts = in_parts(kernels, policy, spec)
    buffers = [new_buffer(policy, spec.dtype, [len(part) for part in parts]) for _ in range(2)]
    sums = new_gradients(policy, spec.dtype, wanted)
    if sums.weight is not None and not parts:
        sums.weight.zero_()
    for number, part in enumerate(parts):
        chunk = compute(kernels, policy, reference, spec, part, buffers, slopes=True)
        add_gradients(kernels.products, sums, policy, chunk, upstream[part], new=number == 0)
    return sums


def num_rows(policy: HeadInputs, spec: DivergenceSpec) -> int:
    return (policy.hidden if spec.rows is None else spec.rows).shape[0]


def in_parts(kernels: DivergenceKernels, policy: HeadInputs, spec: DivergenceSpec) -> tuple[Tensor, ...]:
    """Indices of the results, by chunk."""
    bytes_per_row = 2 * policy.weight.shape[0] * spec.dtype.itemsize  # of policy and reference
    most = int(spec.buffer_mb * 2**20) // bytes_per_row
    usual = max(SLAB_ROWS, int(min(kernels.products.slab_mb, spec.buffer_mb) * 2**20) // bytes_per_row)
    indices = torch.arange(num_rows(policy, spec), dtype=torch.int64, device=policy.hidden.device)
    return indices.split(max(1, min(most, usual))) if len(indices) else ()


def compute(
    kernels: DivergenceKernels,
    policy: HeadInputs,
    reference: HeadInputs,
    spec: DivergenceSpec,
    part: Tensor,  # [n]
    buffers: Sequence[Tensor],  # two of [n, V]
    slopes: bool,
) -> Chunk:
    """The divergences of a chunk in place of log-probabilities."""
    rows = part if spec.rows is None else spec.rows[part]
    ref_rows = part if spec.ref_rows is None else spec.ref_rows[part]
    hidden, (z, r) = policy.hidden[rows], (buffer[: len(part)] for buffer in buffers)
    kernels.products.logits(hidden, policy.weight, z)
    kernels.products.logits(reference.hidden[ref_rows], reference.weight, r)
    dtype = (spec.operands if kernels.narrow_slopes else spec.dtype) if slopes else None
    if spec.top_k:
        values, units, slab = top_k.divergence(kernels.rows, z, policy.bias, r, reference.bias, spec, dtype)
    else:
        values, units, slab = kernels.rows(
            *(z, policy.bias, spec.logit_scale, spec.logit_softcap),
            *(r, reference.bias, spec.ref_logit_scale, spec.ref_logit_softcap),
            *(spec.mixture(), dtype),
        )
    return Chunk(rows, values, hidden, slab, units[:, None] * spec.logit_scale)
