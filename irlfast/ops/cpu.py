"""The pair slab (DESIGN §4) in plain PyTorch: never an ``[N, V]`` tensor, and no second product for the gradient.

The loss couples only the answers of one prompt, so once the logits of such a group are in the buffer (a *slab*), the
derivative g of the loss by each of its log-probabilities is known. With E = exp(z − max) and v = 1/ΣE,

    d hidden = g · D,  D = W[y] − v · (E W)          d weight = scatter_y(g · hidden) − Eᵀ (v · g · hidden)

that is three passes over the head's weight, two where it is frozen: then D alone is kept from the forward. The terms of
the target y are one more entry of the slab: E_y − ΣE in the place of E_y, which also avoids their cancellation.
Logit scale and soft-cap multiply by their derivative: the scale is folded into ``hidden``, the soft-cap's into E.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irlfast.ops.problem import Objective, Problem, Side

SLAB_MB = 32  # a slab's usual size: elementwise steps stay in the last-level cache
SLAB_ROWS = 256  # but at least these rows, or reading the weight would cost more than multiplying by it
TILE = 2048  # rows of a bf16 weight widened at once


def token_logps(policy: Side, reference: Side | None, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """See :func:`irlfast.ops.plain.token_logps`."""
    return score_chunks(policy, reference, problem, list(problem.scored().split(slab_rows(policy, problem))))


def pair_loss(
    policy: Side, reference: Side | None, problem: Problem, pairs: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`irlfast.ops.plain.pair_loss`."""
    slabs = plan(policy, problem, pairs)
    chunks = [tokens for slab in slabs for tokens in slab]
    head_needs_gradient = policy.weight.requires_grad or (policy.bias is not None and policy.bias.requires_grad)
    if not (torch.is_grad_enabled() and head_needs_gradient):
        logps, ref_logps = score_chunks(policy, reference, problem, chunks)
        return objective(logps, ref_logps), logps.detach(), ref_logps
    # The reference is scored in the same chunks: a product of other shape may round differently, and a policy that
    # equals its reference would not have a ratio of exactly 0.
    ref_logps = None if reference is None else score(reference, problem, chunks)
    loss, logps = PairSlabs.apply(*policy, problem, slabs, lambda logps: objective(logps, ref_logps))
    return loss, logps, ref_logps


# ---------------------------------------------------------------- which tokens share a slab


def slab_rows(side: Side, problem: Problem) -> int:
    return max(1, min(buffer_rows(side, problem), max(SLAB_ROWS, rows_in(SLAB_MB, side, problem))))


def buffer_rows(side: Side, problem: Problem) -> int:
    return max(1, rows_in(problem.buffer_mb, side, problem))


def rows_in(megabytes: float, side: Side, problem: Problem) -> int:
    return int(megabytes * 2**20) // (side.weight.shape[0] * problem.dtype.itemsize)


def plan(side: Side, problem: Problem, pairs: Tensor) -> list[tuple[Tensor, ...]]:
    """Slabs of whole groups, each as its chunks of tokens: one chunk, or several where a group exceeds the buffer."""
    usual, largest = slab_rows(side, problem), buffer_rows(side, problem)
    tokens = problem.scored()
    group = groups(pairs, problem.sequences)[problem.sequence[tokens]]
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
    scaled: Tensor  # [n, H] logit_scale · hidden
    slab: Tensor  # [n, V] ∂ log-probability / ∂ (hidden @ weightᵀ), divided by v; lasts until the next chunk
    v: Tensor  # [n, 1] −1/ΣE


def new_buffer(side: Side, problem: Problem, chunks: list[Tensor]) -> Tensor:
    rows = max((len(tokens) for tokens in chunks), default=0)
    return torch.empty(rows, side.weight.shape[0], dtype=problem.dtype)


def compute(side: Side, problem: Problem, tokens: Tensor, buffer: Tensor) -> Chunk:
    scaled = side.hidden[problem.rows_of(tokens)].to(problem.dtype) * problem.logit_scale
    z = buffer[: len(tokens)]
    for part, weight in tiles(side.weight, problem.dtype):
        torch.mm(scaled, weight.T, out=z[:, part])
    if side.bias is not None:
        z += side.bias.to(problem.dtype) * problem.logit_scale
    cap = problem.logit_softcap
    if cap is not None:
        z.div_(cap).tanh_().mul_(cap)
    targets = problem.targets[tokens, None]
    picked, peak = z.gather(1, targets), z.amax(1, keepdim=True)
    norm = exp_(z, peak, cap)
    at_target = -norm if cap is None else norm * ((picked / cap) ** 2 - 1)
    z.scatter_add_(1, targets, at_target)
    return Chunk(tokens, (picked - peak - norm.log()).squeeze(1), scaled, z, -1 / norm)


def exp_(z: Tensor, peak: Tensor, cap: float | None) -> Tensor:
    """Replace logits z ``[n, V]`` by E = exp(z − peak) times the soft-cap's derivative; return ΣE ``[n, 1]``."""
    if cap is None:
        return z.sub_(peak).exp_().sum(1, keepdim=True)
    norm = torch.zeros_like(peak)
    for part in z.split(TILE, dim=1):
        exp = (part - peak).exp_()
        norm += exp.sum(1, keepdim=True)
        part.div_(cap).square_().neg_().add_(1).mul_(exp)
    return norm


def tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in ``dtype`` by rows: at once where it has that dtype, else never widened whole."""
    step = max(1, weight.shape[0]) if weight.dtype == dtype else TILE
    for start in range(0, weight.shape[0], step):
        part = slice(start, min(start + step, weight.shape[0]))
        yield part, weight[part].to(dtype)


def hidden_slope(side: Side, problem: Problem, chunk: Chunk) -> Tensor:
    """D ``[n, H]``: the derivative of each log-probability by its hidden row."""
    product = torch.zeros_like(chunk.scaled)
    for part, weight in tiles(side.weight, problem.dtype):
        product.addmm_(chunk.slab[:, part], weight)
    return product.mul_(chunk.v * problem.logit_scale)


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


def add_gradients(sums: Gradients, side: Side, problem: Problem, chunk: Chunk, upstream: Tensor) -> None:
    """Add a chunk's share; ``upstream`` ``[N]`` is the derivative of the loss by each token's log-probability."""
    g = upstream[chunk.tokens, None]
    if not g.any():  # in no pair, or beyond the hinge
        return
    if sums.hidden is not None:
        sums.hidden.index_add_(0, problem.rows_of(chunk.tokens), g * hidden_slope(side, problem, chunk))
    if sums.weight is not None:
        sums.weight.addmm_(chunk.slab.T, chunk.v * g * chunk.scaled)
    if sums.bias is not None:
        sums.bias.addmv_(chunk.slab.T, (chunk.v * g).squeeze(1), alpha=problem.logit_scale)


# ---------------------------------------------------------------- token log-probabilities, any coupling


def score_chunks(
    policy: Side, reference: Side | None, problem: Problem, chunks: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    wanted = [tensor is not None and tensor.requires_grad for tensor in policy]
    keep = torch.is_grad_enabled() and wanted == [True, False, False]
    logps = TokenLogps.apply(*policy, problem, chunks, keep)
    return logps, None if reference is None else score(reference, problem, chunks)


@torch.no_grad()
def score(side: Side, problem: Problem, chunks: list[Tensor]) -> Tensor:
    buffer = new_buffer(side, problem, chunks)
    logps = torch.zeros(problem.targets.shape, dtype=problem.dtype)
    for tokens in chunks:
        logps[tokens] = compute(side, problem, tokens, buffer).logps
    return logps


class TokenLogps(torch.autograd.Function):
    """One pass, and a second for D where the head is frozen (``keep``); else the backward recomputes every chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        problem, ctx.chunks, ctx.keep = rest
        side = Side(hidden, weight, bias)
        buffer = new_buffer(side, problem, ctx.chunks)
        logps = torch.zeros(problem.targets.shape, dtype=problem.dtype)
        slopes = []
        for tokens in ctx.chunks:
            chunk = compute(side, problem, tokens, buffer)
            logps[tokens] = chunk.logps
            if ctx.keep:
                slopes.append(hidden_slope(side, problem, chunk))
        ctx.problem = problem
        ctx.save_for_backward(*side, *slopes)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        side, slopes = Side(*ctx.saved_tensors[:3]), ctx.saved_tensors[3:]
        sums = new_gradients(side, ctx.problem, ctx.needs_input_grad)
        if sums.hidden is not None and ctx.keep:
            for tokens, slope in zip(ctx.chunks, slopes, strict=True):
                sums.hidden.index_add_(0, ctx.problem.rows_of(tokens), upstream[tokens, None] * slope)
        else:
            buffer = new_buffer(side, ctx.problem, ctx.chunks)
            with torch.autocast("cpu", enabled=False):
                for tokens in ctx.chunks:
                    add_gradients(sums, side, ctx.problem, compute(side, ctx.problem, tokens, buffer), upstream)
        return *rounded(sums, side.hidden.dtype), None, None, None


# ---------------------------------------------------------------- the pair slab


class PairSlabs(torch.autograd.Function):
    """The loss and, while each slab is in the buffer, its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        problem, slabs, objective = rest
        side = Side(hidden, weight, bias)
        buffer = new_buffer(side, problem, [tokens for slab in slabs for tokens in slab])
        logps = torch.zeros(problem.targets.shape, dtype=problem.dtype)
        sums = new_gradients(side, problem, ctx.needs_input_grad)
        for slab in slabs:
            for tokens in slab:
                chunk = compute(side, problem, tokens, buffer)
                logps[tokens] = chunk.logps
            upstream = derivative(objective, logps)
            add_gradients(sums, side, problem, chunk, upstream)  # the last chunk is still in the buffer
            for tokens in slab[:-1]:
                add_gradients(sums, side, problem, compute(side, problem, tokens, buffer), upstream)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*sums)
        ctx.mark_non_differentiable(logps)
        return objective(logps), logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        sums = (None if tensor is None else tensor * upstream for tensor in ctx.saved_tensors)
        return *rounded(Gradients(*sums), ctx.dtype), None, None, None


def derivative(objective: Callable[[Tensor], Tensor], logps: Tensor) -> Tensor:
    """∂ objective / ∂ logps ``[N]``, right for every group whose log-probabilities are all known."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        return torch.autograd.grad(objective(leaf), leaf)[0]


def rounded(sums: Gradients, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in sums)
