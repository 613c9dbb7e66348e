"""The pair slab: never an ``[N, V]`` tensor, and no second product for the gradient.

The loss couples only the answers of one prompt, so once the logits of such a group are in the buffer (a *slab*), the
derivative g of the loss by each of its log-probabilities is known. With E = exp(z − max) and v = 1/ΣE,

    d hidden = g · D,  D = W[y] − v · (E W)          d weight = scatter_y(g · hidden) − Eᵀ (v · g · hidden)

that is three passes over the head's weight, two where it is frozen: then D alone is kept from the forward. The terms of
the target y are one more entry of the slab: E_y − ΣE in the place of E_y, which also avoids their cancellation.
Logit scale and soft-cap multiply by their derivative: the scale's is folded into v, the soft-cap's into E.

What a machine does in its own way, the products and the softmax, is its :class:`SlabKernels`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.types import IGNORE, HeadInputs, PairLossSpec, ScoredTokens, derivative, objective

SLAB_ROWS = 256  # a slab's least rows, or reading the weight would cost more than multiplying by it


class SlabKernels(NamedTuple):
    """The work on one chunk of n tokens, as a machine does it best."""

    slab_mb: float  # a slab's usual size, where ``buffer_mb`` allows it
    logits: Callable[[Tensor, Tensor, Tensor], None]  # (hidden [n, H], weight [V, H], out [n, V]): hidden @ weightᵀ
    # (those, targets [n], side, problem, slopes) -> log-probabilities [n], v [n], slab [n, V]; the first may be
    # overwritten. Without ``slopes`` the log-probabilities, the same to the last digit, are all that is asked for.
    softmax: Callable[[Tensor, Tensor, HeadInputs, ScoredTokens, bool], tuple[Tensor, Tensor, Tensor]]
    by_weight: Callable[[Tensor, Tensor], Tensor]  # (slab [n, V], weight [V, H]): slab @ weight [n, H], fp32 (fp64)
    # (sum [V, H], slab [n, V], [n, H], new): sum += slabᵀ @ it, or sum = slabᵀ @ it where it is new memory
    by_hidden: Callable[[Tensor, Tensor, Tensor, bool], None]
    # (sides, problem, tokens [n], statistics) -> log-probabilities [n] of each side without a slab; into statistics, if
    # given, what ``sparse`` needs; None where a slab is as good
    fused: Callable[[Sequence[HeadInputs], ScoredTokens, Tensor, Tensor | None], Tensor] | None = None
    # (sums, side, problem, tokens [n], upstream [n], statistics): sums += gradients, by the tiles that weigh enough
    sparse: Callable[["Gradients", HeadInputs, ScoredTokens, Tensor, Tensor, Tensor], None] | None = None


@contextmanager
def precision(backend: str, digits: str) -> Iterator[None]:
    """Within it, that backend of torch multiplies fp32 operands as ``digits`` says, whatever the user's setting."""
    setting: Any = getattr(torch.backends, backend).matmul
    before = setting.fp32_precision
    setting.fp32_precision = digits
    try:
        yield
    finally:
        setting.fp32_precision = before


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
    keep: bool,
    tiles: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities ``[N]`` of policy and reference, and what is kept for the gradient: if ``keep``, the policy's
    derivatives ``[N, H]`` by the rows of ``hidden`` that predict the targets, which is all that a frozen head needs;
    with ``tiles``, the statistics ``[2 + tiles, N]`` of :class:`SlabKernels`'s ``sparse``."""
    tokens = scored.indices()
    logps = scored.zeros()
    if kernels.fused and not keep:
        sides = [policy] if reference is None else [policy, reference]
        statistics = logps.new_empty(2 + tiles, len(logps)) if tiles else None
        logps[tokens], *others = kernels.fused(sides, scored, tokens, statistics)
        return logps, scored.zeros().index_put((tokens,), others[0]) if others else None, statistics
    chunks = in_chunks(tokens, slab_rows(kernels, policy, scored))
    # The reference is scored in the policy's chunks: a product of other shape may round differently, and a policy that
    # equals its reference would not have a ratio of exactly 0.
    ref_logps = None if reference is None else score(kernels, reference, scored, chunks)
    if not keep:
        return score(kernels, policy, scored, chunks), ref_logps, None
    buffer = new_buffer(policy, scored, chunks)
    slopes = logps.new_zeros(len(logps), policy.hidden.shape[1])
    for part in chunks:
        chunk = compute(kernels, policy, scored, part, buffer)
        logps[part] = chunk.logps
        slopes[part] = kernels.by_weight(chunk.slab, policy.weight).mul_(chunk.v)
    return logps, ref_logps, slopes


def gradients(
    kernels: SlabKernels,
    policy: HeadInputs,
    scored: ScoredTokens,
    upstream: Tensor,
    statistics: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """Of a loss whose derivatives ``[N]`` by the log-probabilities are ``upstream``: the chunks are computed again, or
    with ``statistics`` those tiles that weigh enough."""
    tokens = scored.indices()
    sums = new_gradients(policy, scored, wanted)
    if sums.weight is not None and (statistics is not None or not len(tokens)):
        sums.weight.zero_()
    if kernels.sparse and statistics is not None:
        kernels.sparse(sums, policy, scored, tokens, upstream[tokens], statistics)
        return sums
    chunks = in_chunks(tokens, slab_rows(kernels, policy, scored))
    buffer = new_buffer(policy, scored, chunks)
    for number, tokens in enumerate(chunks):
        chunk = compute(kernels, policy, scored, tokens, buffer)
        add_gradients(kernels, sums, policy, scored, chunk, upstream, new=number == 0)
    return sums


def pair_loss(
    kernels: SlabKernels,
    policy: HeadInputs,
    reference: HeadInputs | None,
    scored: ScoredTokens,
    spec: PairLossSpec,
    sums: Gradients,
    new: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss ``[]`` and log-probabilities ``[N]`` of policy and reference; the loss's gradients, taken while each slab is
    in the buffer, are added to ``sums``, whose weight is overwritten where it is ``new``."""
    slabs = plan(kernels, policy, scored, spec.pairs)
    chunks = [tokens for slab in slabs for tokens in slab]
    ref_logps = None if reference is None else score(kernels, reference, scored, chunks)
    buffer = new_buffer(policy, scored, chunks)
    logps = scored.zeros()
    if new and not slabs and sums.weight is not None:
        sums.weight.zero_()
    for *others, last in slabs:
        for tokens in others:
            logps[tokens] = compute(kernels, policy, scored, tokens, buffer, slopes=False).logps
        chunk = compute(kernels, policy, scored, last, buffer)
        logps[last] = chunk.logps
        upstream = derivative(logps, ref_logps, scored, spec)
        add_gradients(kernels, sums, policy, scored, chunk, upstream, new)  # while it is in the buffer
        for tokens in others:
            chunk = compute(kernels, policy, scored, tokens, buffer)
            add_gradients(kernels, sums, policy, scored, chunk, upstream, new=False)
        new = False
    return objective(logps, ref_logps, scored, spec), logps, ref_logps


def score(kernels: SlabKernels, side: HeadInputs, scored: ScoredTokens, chunks: Sequence[Tensor]) -> Tensor:
    buffer = new_buffer(side, scored, chunks)
    logps = scored.zeros()
    for tokens in chunks:
        logps[tokens] = compute(kernels, side, scored, tokens, buffer, slopes=False).logps
    return logps


# ---------------------------------------------------------------- which tokens share a slab


def slab_rows(kernels: SlabKernels, side: HeadInputs, scored: ScoredTokens) -> int:
    usual = max(SLAB_ROWS, rows_in(min(kernels.slab_mb, scored.buffer_mb), side, scored))
    return max(1, min(buffer_rows(side, scored), usual))


def buffer_rows(side: HeadInputs, scored: ScoredTokens) -> int:
    return max(1, rows_in(scored.buffer_mb, side, scored))


def rows_in(megabytes: float, side: HeadInputs, scored: ScoredTokens) -> int:
    return int(megabytes * 2**20) // (side.weight.shape[0] * scored.dtype.itemsize)


def in_chunks(tokens: Tensor, rows: int) -> tuple[Tensor, ...]:
    return tokens.split(rows) if len(tokens) else ()


def plan(kernels: SlabKernels, side: HeadInputs, scored: ScoredTokens, pairs: Tensor) -> list[tuple[Tensor, ...]]:
    """Slabs of whole groups, each as its chunks of tokens: one chunk, or several where a group exceeds the buffer."""
    usual, largest = slab_rows(kernels, side, scored), buffer_rows(side, scored)
    mask = scored.targets != IGNORE
    lengths = pairs.new_zeros(scored.sequences).index_add(0, scored.sequence, mask.long())
    counts = torch.cat([lengths, pairs.flatten()]).tolist()  # all that the host must know: one wait for a GPU
    leader = groups(counts[scored.sequences :], scored.sequences)
    sizes = [0] * scored.sequences
    for sequence, count in zip(leader, counts, strict=False):
        sizes[sequence] += count
    slabs: list[int] = []
    for size in sizes:
        if slabs and slabs[-1] + size <= usual:
            slabs[-1] += size
        else:
            slabs.append(size)
    group = torch.tensor(leader, dtype=torch.long, device=pairs.device)[scored.sequence]
    tokens = torch.where(mask, group, scored.sequences).argsort(stable=True)[: sum(sizes)]
    return [slab.split(len(slab) if len(slab) <= largest else usual) for slab in tokens.split(slabs) if len(slab)]


def groups(members: list[int], count: int) -> list[int]:
    """For each sequence the group that pairs, two ``members`` each, connect it to: the number of its first member."""
    leader = list(range(count))

    def find(sequence: int) -> int:
        while leader[sequence] != sequence:
            leader[sequence] = sequence = leader[leader[sequence]]
        return sequence

    for pair in zip(members[::2], members[1::2], strict=True):
        first, second = sorted(map(find, pair))
        leader[second] = first
    return [find(sequence) for sequence in range(count)]


# ---------------------------------------------------------------- one chunk of tokens in the buffer


class Chunk(NamedTuple):
    """Tokens whose logits have been computed: their log-probabilities, and what the gradient needs."""

    tokens: Tensor  # [n]
    logps: Tensor  # [n]
    hidden: Tensor  # [n, H]
    slab: Tensor  # [n, V] ∂ log-probability / ∂ (hidden @ weightᵀ) = v · slab; it lasts until the next chunk
    v: Tensor  # [n, 1]


def new_buffer(side: HeadInputs, scored: ScoredTokens, chunks: Sequence[Tensor]) -> Tensor:
    rows, vocabulary = max((len(tokens) for tokens in chunks), default=0), side.weight.shape[0]
    width = -(-vocabulary // 16) * 16  # rows aligned for wide loads and stores, which take what is beyond V along
    return torch.empty(rows, width, dtype=scored.dtype, device=side.weight.device)[:, :vocabulary]


def compute(
    kernels: SlabKernels, side: HeadInputs, scored: ScoredTokens, tokens: Tensor, buffer: Tensor, slopes: bool = True
) -> Chunk:
    hidden = side.hidden[scored.rows_of(tokens)]
    z = buffer[: len(tokens)]
    kernels.logits(hidden, side.weight, z)
    logps, v, slab = kernels.softmax(z, scored.targets[tokens], side, scored, slopes)
    return Chunk(tokens, logps, hidden, slab, v[:, None] * scored.logit_scale)


# ---------------------------------------------------------------- gradients


def new_gradients(side: HeadInputs, scored: ScoredTokens, wanted: Sequence[bool]) -> Gradients:
    """Zeros; the weight's, by far the largest, is memory that the first product writes."""

    def like(make: Callable[..., Tensor], tensor: Tensor | None, wants: bool) -> Tensor | None:
        return make(tensor, dtype=scored.dtype) if wants and tensor is not None else None

    zeros, memory = torch.zeros_like, torch.empty_like
    return Gradients(
        like(zeros, side.hidden, wanted[0]), like(memory, side.weight, wanted[1]), like(zeros, side.bias, wanted[2])
    )


def add_gradients(
    kernels: SlabKernels,
    sums: Gradients,
    side: HeadInputs,
    scored: ScoredTokens,
    chunk: Chunk,
    upstream: Tensor,
    new: bool,
) -> None:
    """Add a chunk's share, or where the weight's sum is ``new`` write it there; ``upstream`` ``[N]`` is the derivative
    of the loss by each token's log-probability."""
    g = upstream[chunk.tokens, None]
    # Tokens in no pair, or beyond the hinge, add nothing; to ask a GPU is to wait for it.
    if g.device.type == "cpu" and not g.any():
        if new and sums.weight is not None:
            sums.weight.zero_()
        return
    factor = chunk.v * g
    if sums.hidden is not None:
        share = kernels.by_weight(chunk.slab, side.weight).mul_(factor)
        sums.hidden.index_add_(0, scored.rows_of(chunk.tokens), share)
    if sums.weight is not None:
        narrow = torch.empty_like(chunk.hidden, dtype=chunk.slab.dtype)
        kernels.by_hidden(sums.weight, chunk.slab, torch.mul(chunk.hidden, factor, out=narrow), new)
    if sums.bias is not None:
        kernels.by_hidden(sums.bias[:, None], chunk.slab, factor, False)
