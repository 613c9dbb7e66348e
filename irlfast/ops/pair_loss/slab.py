"""The pair slab: never an ``[N, V]`` tensor, and no second product for the gradient.

The loss couples only the answers of one prompt, so once the logits of such a group are in the buffer (a *slab*), the
derivative g of the loss by each of its log-probabilities is known. With E = exp(z − max) and v = 1/ΣE,

    d hidden = g · D,  D = W[y] − v · (E W)          d weight = scatter_y(g · hidden) − Eᵀ (v · g · hidden)

that is three passes over the head's weight, two where it is frozen: then D alone is kept from the forward. The terms of
the target y are one more entry of the slab: E_y − ΣE in the place of E_y, which also avoids their cancellation.
Logit scale and soft-cap multiply by their derivative: the scale's is folded into v, the soft-cap's into E.

What a machine does in its own way, the products and the softmax, is its :class:`Arithmetic`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.types import IGNORE, Coupling, Problem, Side, derivative, objective

SLAB_ROWS = 256  # a slab's least rows, or reading the weight would cost more than multiplying by it


class Arithmetic(NamedTuple):
    """The work on one chunk of n tokens, as a machine does it best."""

    slab_mb: float  # a slab's usual size, where ``buffer_mb`` allows it
    logits: Callable[[Tensor, Tensor, Tensor], None]  # (hidden [n, H], weight [V, H], out [n, V]): hidden @ weightᵀ
    # (those, targets [n], side, problem, slopes) -> log-probabilities [n], v [n], slab [n, V]; the first may be
    # overwritten. Without ``slopes`` the log-probabilities, the same to the last digit, are all that is asked for.
    softmax: Callable[[Tensor, Tensor, Side, Problem, bool], tuple[Tensor, Tensor, Tensor]]
    by_weight: Callable[[Tensor, Tensor], Tensor]  # (slab [n, V], weight [V, H]): slab @ weight [n, H], fp32 (fp64)
    # (sum [V, H], slab [n, V], [n, H], new): sum += slabᵀ @ it, or sum = slabᵀ @ it where it is new memory
    by_hidden: Callable[[Tensor, Tensor, Tensor, bool], None]
    # (sides, problem, tokens [n], statistics) -> log-probabilities [n] of each side without a slab; into statistics, if
    # given, what ``sparse`` needs; None where a slab is as good
    fused: Callable[[Sequence[Side], Problem, Tensor, Tensor | None], Tensor] | None = None
    # (sums, side, problem, tokens [n], upstream [n], statistics): sums += gradients, by the tiles that weigh enough
    sparse: Callable[["Gradients", Side, Problem, Tensor, Tensor, Tensor], None] | None = None


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
    arithmetic: Arithmetic, policy: Side, reference: Side | None, problem: Problem, keep: bool, tiles: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities ``[N]`` of policy and reference, and what is kept for the gradient: if ``keep``, the policy's
    derivatives ``[N, H]`` by the rows of ``hidden`` that predict the targets, which is all that a frozen head needs;
    with ``tiles``, the statistics ``[2 + tiles, N]`` of :class:`Arithmetic`'s ``sparse``."""
    tokens = problem.scored()
    logps = problem.zeros()
    if arithmetic.fused and not keep:
        sides = [policy] if reference is None else [policy, reference]
        statistics = logps.new_empty(2 + tiles, len(logps)) if tiles else None
        logps[tokens], *others = arithmetic.fused(sides, problem, tokens, statistics)
        return logps, problem.zeros().index_put((tokens,), others[0]) if others else None, statistics
    chunks = in_chunks(tokens, slab_rows(arithmetic, policy, problem))
    # The reference is scored in the policy's chunks: a product of other shape may round differently, and a policy that
    # equals its reference would not have a ratio of exactly 0.
    ref_logps = None if reference is None else score(arithmetic, reference, problem, chunks)
    if not keep:
        return score(arithmetic, policy, problem, chunks), ref_logps, None
    buffer = new_buffer(policy, problem, chunks)
    slopes = logps.new_zeros(len(logps), policy.hidden.shape[1])
    for part in chunks:
        chunk = compute(arithmetic, policy, problem, part, buffer)
        logps[part] = chunk.logps
        slopes[part] = arithmetic.by_weight(chunk.slab, policy.weight).mul_(chunk.v)
    return logps, ref_logps, slopes


def gradients(
    arithmetic: Arithmetic,
    policy: Side,
    problem: Problem,
    upstream: Tensor,
    statistics: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """Of a loss whose derivatives ``[N]`` by the log-probabilities are ``upstream``: the chunks are computed again, or
    with ``statistics`` those tiles that weigh enough."""
    tokens = problem.scored()
    sums = new_gradients(policy, problem, wanted)
    if sums.weight is not None and (statistics is not None or not len(tokens)):
        sums.weight.zero_()
    if arithmetic.sparse and statistics is not None:
        arithmetic.sparse(sums, policy, problem, tokens, upstream[tokens], statistics)
        return sums
    chunks = in_chunks(tokens, slab_rows(arithmetic, policy, problem))
    buffer = new_buffer(policy, problem, chunks)
    for number, tokens in enumerate(chunks):
        chunk = compute(arithmetic, policy, problem, tokens, buffer)
        add_gradients(arithmetic, sums, policy, problem, chunk, upstream, new=number == 0)
    return sums


def pair_loss(
    arithmetic: Arithmetic,
    policy: Side,
    reference: Side | None,
    problem: Problem,
    coupling: Coupling,
    sums: Gradients,
    new: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss ``[]`` and log-probabilities ``[N]`` of policy and reference; the loss's gradients, taken while each slab is
    in the buffer, are added to ``sums``, whose weight is overwritten where it is ``new``."""
    slabs = plan(arithmetic, policy, problem, coupling.pairs)
    chunks = [tokens for slab in slabs for tokens in slab]
    ref_logps = None if reference is None else score(arithmetic, reference, problem, chunks)
    buffer = new_buffer(policy, problem, chunks)
    logps = problem.zeros()
    if new and not slabs and sums.weight is not None:
        sums.weight.zero_()
    for *others, last in slabs:
        for tokens in others:
            logps[tokens] = compute(arithmetic, policy, problem, tokens, buffer, slopes=False).logps
        chunk = compute(arithmetic, policy, problem, last, buffer)
        logps[last] = chunk.logps
        upstream = derivative(logps, ref_logps, problem, coupling)
        add_gradients(arithmetic, sums, policy, problem, chunk, upstream, new)  # while it is in the buffer
        for tokens in others:
            chunk = compute(arithmetic, policy, problem, tokens, buffer)
            add_gradients(arithmetic, sums, policy, problem, chunk, upstream, new=False)
        new = False
    return objective(logps, ref_logps, problem, coupling), logps, ref_logps


def score(arithmetic: Arithmetic, side: Side, problem: Problem, chunks: Sequence[Tensor]) -> Tensor:
    buffer = new_buffer(side, problem, chunks)
    logps = problem.zeros()
    for tokens in chunks:
        logps[tokens] = compute(arithmetic, side, problem, tokens, buffer, slopes=False).logps
    return logps


# ---------------------------------------------------------------- which tokens share a slab


def slab_rows(arithmetic: Arithmetic, side: Side, problem: Problem) -> int:
    usual = max(SLAB_ROWS, rows_in(min(arithmetic.slab_mb, problem.buffer_mb), side, problem))
    return max(1, min(buffer_rows(side, problem), usual))


def buffer_rows(side: Side, problem: Problem) -> int:
    return max(1, rows_in(problem.buffer_mb, side, problem))


def rows_in(megabytes: float, side: Side, problem: Problem) -> int:
    return int(megabytes * 2**20) // (side.weight.shape[0] * problem.dtype.itemsize)


def in_chunks(tokens: Tensor, rows: int) -> tuple[Tensor, ...]:
    return tokens.split(rows) if len(tokens) else ()


def plan(arithmetic: Arithmetic, side: Side, problem: Problem, pairs: Tensor) -> list[tuple[Tensor, ...]]:
    """Slabs of whole groups, each as its chunks of tokens: one chunk, or several where a group exceeds the buffer."""
    usual, largest = slab_rows(arithmetic, side, problem), buffer_rows(side, problem)
    scored = problem.targets != IGNORE
    lengths = pairs.new_zeros(problem.sequences).index_add(0, problem.sequence, scored.long())
    counts = torch.cat([lengths, pairs.flatten()]).tolist()  # all that the host must know: one wait for a GPU
    leader = groups(counts[problem.sequences :], problem.sequences)
    sizes = [0] * problem.sequences
    for sequence, count in zip(leader, counts, strict=False):
        sizes[sequence] += count
    slabs: list[int] = []
    for size in sizes:
        if slabs and slabs[-1] + size <= usual:
            slabs[-1] += size
        else:
            slabs.append(size)
    group = torch.tensor(leader, dtype=torch.long, device=pairs.device)[problem.sequence]
    tokens = torch.where(scored, group, problem.sequences).argsort(stable=True)[: sum(sizes)]
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


def new_buffer(side: Side, problem: Problem, chunks: Sequence[Tensor]) -> Tensor:
    rows, vocabulary = max((len(tokens) for tokens in chunks), default=0), side.weight.shape[0]
    width = -(-vocabulary // 16) * 16  # rows aligned for wide loads and stores, which take what is beyond V along
    return torch.empty(rows, width, dtype=problem.dtype, device=side.weight.device)[:, :vocabulary]


def compute(
    arithmetic: Arithmetic, side: Side, problem: Problem, tokens: Tensor, buffer: Tensor, slopes: bool = True
) -> Chunk:
    hidden = side.hidden[problem.rows_of(tokens)]
    z = buffer[: len(tokens)]
    arithmetic.logits(hidden, side.weight, z)
    logps, v, slab = arithmetic.softmax(z, problem.targets[tokens], side, problem, slopes)
    return Chunk(tokens, logps, hidden, slab, v[:, None] * problem.logit_scale)


# ---------------------------------------------------------------- gradients


def new_gradients(side: Side, problem: Problem, wanted: Sequence[bool]) -> Gradients:
    """Zeros; the weight's, by far the largest, is memory that the first product writes."""

    def like(make: Callable[..., Tensor], tensor: Tensor | None, wants: bool) -> Tensor | None:
        return make(tensor, dtype=problem.dtype) if wants and tensor is not None else None

    zeros, memory = torch.zeros_like, torch.empty_like
    return Gradients(
        like(zeros, side.hidden, wanted[0]), like(memory, side.weight, wanted[1]), like(zeros, side.bias, wanted[2])
    )


def add_gradients(
    arithmetic: Arithmetic, sums: Gradients, side: Side, problem: Problem, chunk: Chunk, upstream: Tensor, new: bool
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
        share = arithmetic.by_weight(chunk.slab, side.weight).mul_(factor)
        sums.hidden.index_add_(0, problem.rows_of(chunk.tokens), share)
    if sums.weight is not None:
        narrow = torch.empty_like(chunk.hidden, dtype=chunk.slab.dtype)
        arithmetic.by_hidden(sums.weight, chunk.slab, torch.mul(chunk.hidden, factor, out=narrow), new)
    if sums.bias is not None:
        arithmetic.by_hidden(sums.bias[:, None], chunk.slab, factor, False)
