"""The pair slab: never an ``[N, V]`` tensor, and no second product for the gradient.

The loss couples only the answers of one prompt, so once the logits of such a group are in the buffer (a *slab*), the
derivative g of the loss by each of its log-probabilities is known. With E = exp(z − max) and v = 1/ΣE,

    d hidden = g · D,  D = W[y] − v · (E W)          d weight = scatter_y(g · hidden) − Eᵀ (v · g · hidden)

that is three passes over the head's weight, two where it is frozen: then D alone is kept from the forward. The terms of
the target y are one more entry of the slab: E_y − ΣE in the place of E_y, which also avoids their cancellation.
Logit scale and soft-cap multiply by their derivative: the scale's is folded into v, the soft-cap's into E.

What a machine does in its own way, the products and the softmax, is its :class:`Arithmetic`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast.ops.problem import Objective, Problem, Side

SLAB_ROWS = 256  # a slab's least rows, or reading the weight would cost more than multiplying by it


class Arithmetic(NamedTuple):
    """The work on one chunk of n tokens, as a machine does it best."""

    slab_mb: float  # a slab's usual size, where ``buffer_mb`` allows it
    logits: Callable[[Tensor, Tensor, Tensor], None]  # (hidden [n, H], weight [V, H], out [n, V]): hidden @ weightᵀ
    # (those, targets [n], side, problem) -> log-probabilities [n], v [n], slab [n, V]; the first may be overwritten
    softmax: Callable[[Tensor, Tensor, Side, Problem], tuple[Tensor, Tensor, Tensor]]
    by_weight: Callable[[Tensor, Tensor], Tensor]  # (slab [n, V], weight [V, H]): slab @ weight [n, H], fp32 (fp64)
    by_hidden: Callable[[Tensor, Tensor, Tensor], None]  # (sum [V, H], slab [n, V], [n, H]): sum += slabᵀ @ it
    # (sides, problem, tokens [n]) -> log-probabilities [n] of each side, without a slab; None where a slab is as good
    fused: Callable[[Sequence[Side], Problem, Tensor], Tensor] | None = None


def token_logps(
    arithmetic: Arithmetic, policy: Side, reference: Side | None, problem: Problem
) -> tuple[Tensor, Tensor | None]:
    """See :func:`irlfast.ops.plain.token_logps`."""
    chunks = problem.scored().split(slab_rows(arithmetic, policy, problem))
    return score_chunks(arithmetic, policy, reference, problem, list(chunks))


def pair_loss(
    arithmetic: Arithmetic, policy: Side, reference: Side | None, problem: Problem, pairs: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`irlfast.ops.plain.pair_loss`."""
    slabs = plan(arithmetic, policy, problem, pairs)
    chunks = [tokens for slab in slabs for tokens in slab]
    head_needs_gradient = policy.weight.requires_grad or (policy.bias is not None and policy.bias.requires_grad)
    if not (torch.is_grad_enabled() and head_needs_gradient):
        logps, ref_logps = score_chunks(arithmetic, policy, reference, problem, chunks)
        return objective(logps, ref_logps), logps.detach(), ref_logps
    # The reference is scored in the same chunks: a product of other shape may round differently, and a policy that
    # equals its reference would not have a ratio of exactly 0.
    ref_logps = None if reference is None else score(arithmetic, reference, problem, chunks)
    loss, logps = PairSlabs.apply(*policy, arithmetic, problem, slabs, lambda logps: objective(logps, ref_logps))
    return loss, logps, ref_logps


# ---------------------------------------------------------------- which tokens share a slab


def slab_rows(arithmetic: Arithmetic, side: Side, problem: Problem) -> int:
    usual = max(SLAB_ROWS, rows_in(min(arithmetic.slab_mb, problem.buffer_mb), side, problem))
    return max(1, min(buffer_rows(side, problem), usual))


def buffer_rows(side: Side, problem: Problem) -> int:
    return max(1, rows_in(problem.buffer_mb, side, problem))


def rows_in(megabytes: float, side: Side, problem: Problem) -> int:
    return int(megabytes * 2**20) // (side.weight.shape[0] * problem.dtype.itemsize)


def plan(arithmetic: Arithmetic, side: Side, problem: Problem, pairs: Tensor) -> list[tuple[Tensor, ...]]:
    """Slabs of whole groups, each as its chunks of tokens: one chunk, or several where a group exceeds the buffer."""
    usual, largest = slab_rows(arithmetic, side, problem), buffer_rows(side, problem)
    tokens = problem.scored()
    group = groups(pairs, problem.sequences).to(tokens.device)[problem.sequence[tokens]]
    sizes: list[int] = []
    for size in group.bincount().tolist():
        if sizes and sizes[-1] + size <= usual:
            sizes[-1] += size
        else:
            sizes.append(size)
    slabs = tokens[group.argsort(stable=True)].split(sizes)
    return [slab.split(len(slab) if 0 < len(slab) <= largest else usual) for slab in slabs]


def groups(pairs: Tensor, count: int) -> Tensor:
    """For every sequence the group ``[S]`` of sequences that pairs connect it to: the number of its first member."""
    leader = list(range(count))

    def find(sequence: int) -> int:
        while leader[sequence] != sequence:
            leader[sequence] = sequence = leader[leader[sequence]]
        return sequence

    for pair in pairs.tolist():
        first, second = sorted(map(find, pair))
        leader[second] = first
    return torch.tensor([find(sequence) for sequence in range(count)], dtype=torch.long)


# ---------------------------------------------------------------- one chunk of tokens in the buffer


class Chunk(NamedTuple):
    """Tokens whose logits have been computed: their log-probabilities, and what the gradient needs."""

    tokens: Tensor  # [n]
    logps: Tensor  # [n]
    hidden: Tensor  # [n, H]
    slab: Tensor  # [n, V] ∂ log-probability / ∂ (hidden @ weightᵀ) = v · slab; it lasts until the next chunk
    v: Tensor  # [n, 1]


def new_buffer(side: Side, problem: Problem, chunks: list[Tensor]) -> Tensor:
    rows, vocabulary = max((len(tokens) for tokens in chunks), default=0), side.weight.shape[0]
    width = -(-vocabulary // 16) * 16  # rows aligned for wide loads
    return torch.empty(rows, width, dtype=problem.dtype, device=side.weight.device)[:, :vocabulary]


def compute(arithmetic: Arithmetic, side: Side, problem: Problem, tokens: Tensor, buffer: Tensor) -> Chunk:
    hidden = side.hidden[problem.rows_of(tokens)]
    z = buffer[: len(tokens)]
    arithmetic.logits(hidden, side.weight, z)
    logps, v, slab = arithmetic.softmax(z, problem.targets[tokens], side, problem)
    return Chunk(tokens, logps, hidden, slab, v[:, None] * problem.logit_scale)


def hidden_slope(arithmetic: Arithmetic, side: Side, chunk: Chunk) -> Tensor:
    """D ``[n, H]``: the derivative of each log-probability by its hidden row."""
    return arithmetic.by_weight(chunk.slab, side.weight).mul_(chunk.v)


# ---------------------------------------------------------------- gradients


class Gradients(NamedTuple):
    """Sums in fp32 (fp64), rounded once when all is added; None where not wanted."""

    hidden: Tensor | None  # [R, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


def new_gradients(side: Side, problem: Problem, wanted: Sequence[bool]) -> Gradients:
    def zeros(tensor: Tensor | None, wants: bool) -> Tensor | None:
        return torch.zeros_like(tensor, dtype=problem.dtype) if wants and tensor is not None else None

    return Gradients(zeros(side.hidden, wanted[0]), zeros(side.weight, wanted[1]), zeros(side.bias, wanted[2]))


def add_gradients(
    arithmetic: Arithmetic, sums: Gradients, side: Side, problem: Problem, chunk: Chunk, upstream: Tensor
) -> None:
    """Add a chunk's share; ``upstream`` ``[N]`` is the derivative of the loss by each token's log-probability."""
    g = upstream[chunk.tokens, None]
    if g.device.type == "cpu" and not g.any():  # in no pair, or beyond the hinge; to ask a GPU is to wait for it
        return
    if sums.hidden is not None:
        sums.hidden.index_add_(0, problem.rows_of(chunk.tokens), g * hidden_slope(arithmetic, side, chunk))
    if sums.weight is not None:
        arithmetic.by_hidden(sums.weight, chunk.slab, chunk.v * g * chunk.hidden)
    if sums.bias is not None:
        arithmetic.by_hidden(sums.bias[:, None], chunk.slab, chunk.v * g)


# ---------------------------------------------------------------- token log-probabilities, any coupling


def score_chunks(
    arithmetic: Arithmetic, policy: Side, reference: Side | None, problem: Problem, chunks: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    wanted = [tensor is not None and tensor.requires_grad for tensor in policy]
    keep = torch.is_grad_enabled() and wanted == [True, False, False]
    return TokenLogps.apply(*policy, reference, arithmetic, problem, chunks, keep)


@torch.no_grad()
def score(arithmetic: Arithmetic, side: Side, problem: Problem, chunks: list[Tensor]) -> Tensor:
    buffer = new_buffer(side, problem, chunks)
    logps = problem.zeros()
    for tokens in chunks:
        logps[tokens] = compute(arithmetic, side, problem, tokens, buffer).logps
    return logps


class TokenLogps(torch.autograd.Function):
    """One pass, and a second for D where the head is frozen (``keep``); else the backward recomputes every chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        reference, arithmetic, problem, ctx.chunks, ctx.keep = rest
        policy, logps, slopes = Side(hidden, weight, bias), problem.zeros(), []
        if arithmetic.fused and not ctx.keep:
            ref_logps = None if reference is None else problem.zeros()
            tokens = torch.cat(ctx.chunks)
            logps[tokens], *others = arithmetic.fused([policy, reference] if reference else [policy], problem, tokens)
            if ref_logps is not None:
                ref_logps[tokens] = others[0]
        else:
            buffer = new_buffer(policy, problem, ctx.chunks)
            for tokens in ctx.chunks:
                chunk = compute(arithmetic, policy, problem, tokens, buffer)
                logps[tokens] = chunk.logps
                if ctx.keep:
                    slopes.append(hidden_slope(arithmetic, policy, chunk))
            ref_logps = None if reference is None else score(arithmetic, reference, problem, ctx.chunks)
        ctx.arithmetic, ctx.problem = arithmetic, problem
        ctx.save_for_backward(*policy, *slopes)
        if ref_logps is not None:
            ctx.mark_non_differentiable(ref_logps)
        return logps, ref_logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        side, slopes = Side(*ctx.saved_tensors[:3]), ctx.saved_tensors[3:]
        sums = new_gradients(side, ctx.problem, ctx.needs_input_grad)
        if sums.hidden is not None and ctx.keep:
            for tokens, slope in zip(ctx.chunks, slopes, strict=True):
                sums.hidden.index_add_(0, ctx.problem.rows_of(tokens), upstream[tokens, None] * slope)
        else:
            buffer = new_buffer(side, ctx.problem, ctx.chunks)
            with torch.autocast(side.hidden.device.type, enabled=False):
                for tokens in ctx.chunks:
                    chunk = compute(ctx.arithmetic, side, ctx.problem, tokens, buffer)
                    add_gradients(ctx.arithmetic, sums, side, ctx.problem, chunk, upstream)
        return *rounded(sums, side.hidden.dtype), None, None, None, None, None


# ---------------------------------------------------------------- the pair slab


class PairSlabs(torch.autograd.Function):
    """The loss and, while each slab is in the buffer, its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        arithmetic, problem, slabs, objective = rest
        side = Side(hidden, weight, bias)
        buffer = new_buffer(side, problem, [tokens for slab in slabs for tokens in slab])
        logps = problem.zeros()
        sums = new_gradients(side, problem, ctx.needs_input_grad)
        for slab in slabs:
            for tokens in slab:
                chunk = compute(arithmetic, side, problem, tokens, buffer)
                logps[tokens] = chunk.logps
            upstream = derivative(objective, logps)
            add_gradients(arithmetic, sums, side, problem, chunk, upstream)  # the last chunk is still in the buffer
            for tokens in slab[:-1]:
                chunk = compute(arithmetic, side, problem, tokens, buffer)
                add_gradients(arithmetic, sums, side, problem, chunk, upstream)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*sums)
        ctx.mark_non_differentiable(logps)
        return objective(logps), logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        sums = (None if tensor is None else tensor * upstream for tensor in ctx.saved_tensors)
        return *rounded(Gradients(*sums), ctx.dtype), None, None, None, None


def derivative(objective: Callable[[Tensor], Tensor], logps: Tensor) -> Tensor:
    """∂ objective / ∂ logps ``[N]``, right for every group whose log-probabilities are all known."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        return torch.autograd.grad(objective(leaf), leaf)[0]


def rounded(sums: Gradients, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in sums)
