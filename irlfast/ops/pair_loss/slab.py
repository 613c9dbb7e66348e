"""The pair slab: no ``[N, V]`` tensor, and no second product with the weight for the gradient.

The loss couples the answers of one prompt only. So once the logits of such a group are in the buffer (a *slab*), the
derivative g of the loss by each of its log-probabilities is known. With E = exp(z − max) and v = 1/ΣE,

    d hidden = g · D,  D = W[y] − v · (E W)          d weight = scatter_y(g · hidden) − Eᵀ (v · g · hidden)

These are three passes over the head's weight, and two where the weight is frozen: then D alone is kept from the
forward. The terms of the target y are one more entry of the slab: E_y − ΣE in the place of E_y, which also avoids their
cancellation. The derivative of the logit scale is folded into v, and that of the soft-cap into E.

The products and the softmax differ between machines: see :class:`SlabKernels`.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.types import IGNORE, HeadInputs, PairLossSpec, ScoredTokens
from irlfast.ops.pair_loss.objective import couplings, derivatives

SLAB_ROWS = 256  # a slab has at least so many rows: with fewer, reading the weight costs more than multiplying by it


class SlabKernels(NamedTuple):
    """The work on one chunk of n tokens, as one kind of machine does it best."""

    slab_mb: float  # a slab's usual size, where ``buffer_mb`` allows it
    logits: Callable[[Tensor, Tensor, Tensor], None]  # (hidden [n, H], weight [V, H], out [n, V]): hidden @ weightᵀ
    # (logits [n, V], targets [n], head inputs, scored, slopes) -> log-probabilities [n], v [n], slab [n, V].
    # The logits may be overwritten. Without ``slopes`` only the log-probabilities are needed; they have the same bits.
    softmax: Callable[[Tensor, Tensor, HeadInputs, ScoredTokens, bool], tuple[Tensor, Tensor, Tensor]]
    times_weight: Callable[[Tensor, Tensor], Tensor]  # (slab [n, V], weight [V, H]): slab @ weight [n, H], fp32 (fp64)
    # (total [V, H], slab [n, V], hidden [n, H], new): total += slabᵀ @ hidden; written, not added, where it is ``new``
    add_times_hidden: Callable[[Tensor, Tensor, Tensor, bool], None]
    # (head inputs of policy and reference, scored, tokens [n]) -> log-probabilities [n] of each, without a slab. None
    # where a slab is as fast.
    fused_logps: Callable[[Sequence[HeadInputs], ScoredTokens, Tensor], Tensor] | None = None
    # (hidden [n, H], targets [n], head inputs, scored, slab [n, V], slopes) -> log-probabilities [n], v [n], slab, and
    # what its tiles weigh. None: ``logits`` and ``softmax`` do the work of this one product.
    exponentials: Callable[..., tuple[Tensor, Tensor, Tensor, Any]] | None = None
    # (chunk, g [n], scored) -> the chunk's slab without the tiles that weigh less than ``scored.skip_mass``
    without_light_tiles: Callable[["Chunk", Tensor, ScoredTokens], Any] | None = None
    slab_dtype: torch.dtype | None = None  # None: that of the logits
    # Kernels for calls in which ``exponentials`` overflow; a log-probability is then −inf.
    otherwise: "SlabKernels | None" = None


class Gradients(NamedTuple):
    """Sums in fp32 (fp64), rounded once when all is added; None where not wanted."""

    hidden: Tensor | None  # [R, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


def token_logps(
    kernels: SlabKernels,
    policy: HeadInputs,
    reference: HeadInputs | None,
    scored: ScoredTokens,
    keep_slopes: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities ``[N]`` of policy and reference.

    With ``keep_slopes``, also the derivatives ``[N, H]`` of the policy's log-probabilities by their hidden rows: the
    backward of a frozen head needs no more.
    """
    tokens = scored.indices()
    logps = scored.zeros()
    if kernels.fused_logps and not keep_slopes:
        both = [policy] if reference is None else [policy, reference]
        logps[tokens], *others = kernels.fused_logps(both, scored, tokens)
        return logps, scored.zeros().index_put((tokens,), others[0]) if others else None, None
    chunks = in_chunks(scored, tokens, slab_rows(kernels, policy, scored))
    # The reference is scored in the policy's chunks: a product of another shape may round differently, and a policy
    # that equals its reference would not have a ratio of exactly 0.
    ref_logps = None if reference is None else placed(scored, tokens, score(kernels, reference, chunks))
    if not keep_slopes:
        return placed(scored, tokens, score(kernels, policy, chunks)), ref_logps, None
    buffer = new_buffer(policy, slab_dtype(kernels, scored), chunk_sizes(chunks))
    slopes = logps.new_zeros(len(logps), policy.hidden.shape[1])
    for indices, part in zip(tokens.split(chunk_sizes(chunks)), chunks, strict=True):
        chunk = compute(kernels, policy, part, buffer)
        logps[indices] = chunk.logps
        slopes[indices] = kernels.times_weight(chunk.slab, policy.weight).mul_(chunk.v)
    return logps, ref_logps, slopes


def gradients(
    kernels: SlabKernels,
    policy: HeadInputs,
    scored: ScoredTokens,
    upstream: Tensor,  # [N] the loss's derivatives by the log-probabilities
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of a loss. The chunks are computed again."""
    tokens = scored.indices()
    sums = new_gradients(policy, scored.dtype, wanted)
    if sums.weight is not None and not len(tokens):
        sums.weight.zero_()
    chunks = in_chunks(scored, tokens, slab_rows(kernels, policy, scored))
    sizes = chunk_sizes(chunks)
    buffer = new_buffer(policy, slab_dtype(kernels, scored), sizes)
    for number, (part, g) in enumerate(zip(chunks, upstream[tokens].split(sizes), strict=True)):
        add_gradients(kernels, sums, policy, compute(kernels, policy, part, buffer), g, new=number == 0)
    return sums


def pair_loss(
    kernels: SlabKernels,
    policy: HeadInputs,
    reference: HeadInputs | None,
    scored: ScoredTokens,
    spec: PairLossSpec,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Log-probabilities ``[N]`` of policy and reference, and the loss's gradients by hidden, weight and bias.

    The gradients are taken while each slab is in the buffer.
    """
    sums = new_gradients(policy, scored.dtype, wanted)
    tokens, slabs = plan(kernels, policy, scored, spec.pairs)
    sizes = [size for slab in slabs for size in slab]
    computed = None
    if reference is not None:
        chunks = scored.only(tokens).split(sizes)
        computed = placed(scored, tokens, score(kernels, reference, chunks))
    ref_logps = scored.ref_logps if computed is None else computed
    buffer = new_buffer(policy, slab_dtype(kernels, scored), sizes)
    logps = []
    if not slabs and sums.weight is not None:
        sums.weight.zero_()
    coupled = couplings(scored, ref_logps, spec, tokens, [sum(slab) for slab in slabs])
    for number, (slab, coupling) in enumerate(zip(slabs, coupled, strict=True)):
        *others, last = coupling.scored.split(slab)
        earlier = [compute(kernels, policy, part, buffer, slopes=False).logps for part in others]
        chunk = compute(kernels, policy, last, buffer)
        logps.append(torch.cat([*earlier, chunk.logps]) if others else chunk.logps)
        *upstream, g = derivatives(logps[-1], coupling, spec).split(slab)
        chunk = without_light_tiles(kernels, chunk, g, scored)
        add_gradients(kernels, sums, policy, chunk, g, new=number == 0)  # while it is in the buffer
        for part, g in zip(others, upstream, strict=True):
            chunk = without_light_tiles(kernels, compute(kernels, policy, part, buffer), g, scored)
            add_gradients(kernels, sums, policy, chunk, g, new=False)
    return placed(scored, tokens, logps), computed, *sums


def score(kernels: SlabKernels, inputs: HeadInputs, chunks: Sequence[ScoredTokens]) -> list[Tensor]:
    """The log-probabilities of each chunk."""
    if not chunks:
        return []
    buffer = new_buffer(inputs, slab_dtype(kernels, chunks[0]), chunk_sizes(chunks))
    return [compute(kernels, inputs, part, buffer, slopes=False).logps for part in chunks]


def placed(scored: ScoredTokens, tokens: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """``[N]``: the values of these tokens, given in parts, and 0 where a target is skipped."""
    values = scored.zeros()
    if parts:
        values[tokens] = torch.cat(list(parts))
    return values


# ---------------------------------------------------------------- which tokens share a slab


def slab_rows(kernels: SlabKernels, inputs: HeadInputs, scored: ScoredTokens) -> int:
    """A slab's usual number of rows."""
    usual = max(SLAB_ROWS, rows_in(min(kernels.slab_mb, scored.buffer_mb), kernels, inputs, scored))
    return max(1, min(buffer_rows(kernels, inputs, scored), usual))


def buffer_rows(kernels: SlabKernels, inputs: HeadInputs, scored: ScoredTokens) -> int:
    """The most rows that the buffer may have."""
    return max(1, rows_in(scored.buffer_mb, kernels, inputs, scored))


def rows_in(megabytes: float, kernels: SlabKernels, inputs: HeadInputs, scored: ScoredTokens) -> int:
    vocabulary = scored.widest_shard or inputs.weight.shape[0]  # all ranks of a group take the same rows
    return int(megabytes * 2**20) // (vocabulary * slab_dtype(kernels, scored).itemsize)


def slab_dtype(kernels: SlabKernels, scored: ScoredTokens) -> torch.dtype:
    """The dtype of the buffer: that of the logits, unless the slab is made without them."""
    return kernels.slab_dtype or scored.dtype


def in_chunks(scored: ScoredTokens, tokens: Tensor, rows: int) -> list[ScoredTokens]:
    """The targets at these indices, in chunks of ``rows`` tokens."""
    return scored.only(tokens).split(rows) if len(tokens) else []


def chunk_sizes(chunks: Sequence[ScoredTokens]) -> list[int]:
    return [len(part.targets) for part in chunks]


def plan(
    kernels: SlabKernels, inputs: HeadInputs, scored: ScoredTokens, pairs: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """The scored tokens in the order of their slabs, and for each slab the sizes of its chunks.

    A slab has whole groups. It is one chunk, or several where a group exceeds the buffer.
    """
    usual, largest = slab_rows(kernels, inputs, scored), buffer_rows(kernels, inputs, scored)
    mask = scored.targets != IGNORE
    lengths = pairs.new_zeros(scored.num_sequences).index_add(0, scored.sequence_ids, mask.long())
    counts = torch.cat([lengths, pairs.flatten()]).tolist()  # one copy to the host, for which a GPU is waited for once
    leader = groups(counts[scored.num_sequences :], scored.num_sequences)
    sizes = [0] * scored.num_sequences
    for sequence, count in zip(leader, counts, strict=False):
        sizes[sequence] += count
    slab_of_group = best_fit(sizes, usual)
    slab_of = [slab_of_group[first] for first in leader]
    slabs = [0] * (1 + max(slab_of, default=0))
    for number, count in zip(slab_of, counts, strict=False):
        slabs[number] += count
    numbers = torch.tensor(slab_of, dtype=torch.long, device=pairs.device)[scored.sequence_ids]
    tokens = torch.where(mask, numbers, len(slabs)).argsort(stable=True)[: sum(slabs)]
    return tokens, [sizes_of_chunks(rows, rows if rows <= largest else usual) for rows in slabs if rows]


def sizes_of_chunks(tokens: int, rows: int) -> list[int]:
    return [min(rows, tokens - start) for start in range(0, tokens, rows)]


def best_fit(sizes: Sequence[int], usual: int) -> list[int]:
    """The slab of each group, as a number: largest groups first, each in the fullest slab that has room for it."""
    slabs = [0] * len(sizes)
    room: list[tuple[int, int]] = []  # the rows left in each slab and its number, fullest first
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):
        place = bisect_left(room, (sizes[group], 0))
        left, slabs[group] = room.pop(place) if place < len(room) else (max(usual, sizes[group]), len(room))
        insort(room, (left - sizes[group], slabs[group]))
    return slabs


def groups(members: list[int], count: int) -> list[int]:
    """The group of each of ``count`` sequences, as the number of its first sequence.

    Pairs, which are two ``members`` each, connect the sequences of a group.
    """
    leader = list(range(count))

    def first_of(sequence: int) -> int:
        while leader[sequence] != sequence:
            leader[sequence] = sequence = leader[leader[sequence]]
        return sequence

    for pair in zip(members[::2], members[1::2], strict=True):
        first, second = sorted(map(first_of, pair))
        leader[second] = first
    return [first_of(sequence) for sequence in range(count)]


# ---------------------------------------------------------------- one chunk of tokens in the buffer


class Chunk(NamedTuple):
    """Tokens whose logits are in the buffer: their log-probabilities, and what the gradient needs."""

    rows: Tensor  # [n] of the hidden states
    logps: Tensor  # [n]
    hidden: Tensor  # [n, H]
    slab: Any  # [n, V] ∂ log-probability / ∂ (hidden @ weightᵀ) = v · slab; valid until the next chunk
    v: Tensor  # [n, 1]
    tile_weights: Any = None  # what ``exponentials`` leave for ``without_light_tiles``


def new_buffer(inputs: HeadInputs, dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
    """Memory ``[n, V]`` for the logits of the largest chunk, of chunks of these sizes."""
    rows, vocabulary = max(sizes, default=0), inputs.weight.shape[0]
    width = -(-vocabulary // 16) * 16  # rows are aligned for wide loads and stores, which may go beyond V
    return torch.empty(rows, width, dtype=dtype, device=inputs.weight.device)[:, :vocabulary]


def compute(
    kernels: SlabKernels, inputs: HeadInputs, scored: ScoredTokens, buffer: Tensor, slopes: bool = True
) -> Chunk:
    """Score a chunk: ``scored`` has its tokens alone."""
    targets, rows = scored.targets, scored.rows
    assert rows is not None  # see ScoredTokens.only
    hidden = inputs.hidden[rows]
    z, tile_weights = buffer[: len(targets)], None
    if kernels.exponentials:
        logps, v, slab, tile_weights = kernels.exponentials(hidden, targets, inputs, scored, z, slopes)
    else:
        kernels.logits(hidden, inputs.weight, z)
        logps, v, slab = kernels.softmax(z, targets, inputs, scored, slopes)
    v = v[:, None] if scored.logit_scale == 1 else v[:, None] * scored.logit_scale
    return Chunk(rows, logps, hidden, slab, v, tile_weights)


def without_light_tiles(kernels: SlabKernels, chunk: Chunk, g: Tensor, scored: ScoredTokens) -> Chunk:
    """The chunk with the tiles of its slab that weigh more than ``scored.skip_mass``, where the kernels can."""
    if not scored.skip_mass or kernels.without_light_tiles is None:
        return chunk
    return chunk._replace(slab=kernels.without_light_tiles(chunk, g, scored))


# ---------------------------------------------------------------- gradients


def new_gradients(inputs: HeadInputs, dtype: torch.dtype, wanted: Sequence[bool]) -> Gradients:
    """Zeros. The weight's sum, by far the largest, is uninitialised memory: the first product overwrites it."""

    def like(make: Callable[..., Tensor], tensor: Tensor | None, wants: bool) -> Tensor | None:
        if not wants or tensor is None:
            return None
        return make(tensor, dtype=dtype, memory_format=torch.contiguous_format)

    hidden, weight, bias = wanted
    return Gradients(
        hidden=like(torch.zeros_like, inputs.hidden, hidden),
        weight=like(torch.empty_like, inputs.weight, weight),
        bias=like(torch.zeros_like, inputs.bias, bias),
    )


def add_gradients(
    kernels: SlabKernels,
    sums: Gradients,
    inputs: HeadInputs,
    chunk: Chunk,
    g: Tensor,  # [n] the loss's derivatives by the chunk's log-probabilities
    new: bool,
) -> None:
    """Add a chunk's part of the gradients; the weight's is written, not added, where its sum is ``new``."""
    # Tokens in no pair, or beyond the hinge, add nothing. A GPU is not asked: the host would wait for it.
    if g.device.type == "cpu" and not g.any():
        if new and sums.weight is not None:
            sums.weight.zero_()
        return
    factor = chunk.v * g[:, None]
    if sums.hidden is not None:
        d_hidden = kernels.times_weight(chunk.slab, inputs.weight).mul_(factor)
        sums.hidden.index_add_(0, chunk.rows, d_hidden)
    unit = unit_of(factor, chunk.slab.dtype)
    if unit != 1:
        factor = factor / unit
    if sums.weight is not None:
        narrow = torch.empty_like(chunk.hidden, dtype=chunk.slab.dtype)
        torch.mul(chunk.hidden, factor, out=narrow)
        with in_units(sums.weight, unit, new):
            kernels.add_times_hidden(sums.weight, chunk.slab, narrow, new)
    if sums.bias is not None:
        with in_units(sums.bias, unit, False):
            kernels.add_times_hidden(sums.bias[:, None], chunk.slab, factor, False)


def unit_of(factor: Tensor, dtype: torch.dtype) -> float:
    """For fp16, the power of two next to the largest factor, which the host waits for; else 1.

    A product takes its factors in ``dtype``. fp16 ends at 6e-8; with β = 0.01 and 1e5 pairs, a factor is 1e-7 at most.
    A unit is at least 2^-64, so that no sum overflows in it.
    """
    largest = float(factor.abs().max()) if dtype == torch.float16 else 0.0
    return 2.0 ** max(math.frexp(largest)[1], -64) if 0 < largest < math.inf else 1.0


@contextmanager
def in_units(total: Tensor, unit: float, new: bool) -> Iterator[None]:
    """Count ``total`` in these units during the block. Powers of two round nothing."""
    if unit != 1 and not new:
        total /= unit
    yield
    if unit != 1:
        total *= unit
