"""Which prompt groups an optimiser step takes, and which of them each process runs together as a micro-batch."""

import sys
from collections.abc import Sequence

import numpy as np

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.packing import (
    Layout,
    PromptGroup,
    count_tokens,
    piece_length,
    pieces_of,
    readings,
    token_counts,
)

CPU_TOKENS = 1024  # per micro-batch: more is no faster on a CPU, and takes memory


def plan_steps(count: int, batch: int, *, epochs: float | None, steps: int | None, seed: list[int]) -> list[np.ndarray]:
    """Return the numbers of the groups that each optimiser step takes: ``batch`` of ``count``, shuffled in each epoch.

    ``epochs`` may be a fraction. A last incomplete step is dropped, but there is at least one step: where fewer than
    ``batch`` groups exist, it takes groups of further epochs.
    """
    wanted = steps or max(1, int(count * (epochs or 1) // batch))
    passes = -(-wanted * batch // count)
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(count) for _ in range(passes)])
    return list(order[: wanted * batch].reshape(wanted, batch))


def micro_batches(
    step: Sequence[int], groups: Sequence[PromptGroup], layout: Layout, limit: int, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """Return this rank's micro-batches of a step: lists of groups' numbers, at most ``limit`` tokens with padding.

    A group longer than ``limit`` is a micro-batch of its own. The groups of every rank cost about the same. Every rank
    has the same number of micro-batches, the costliest first, so that the ranks wait little for each other. Some are
    empty where a step has few groups.
    """
    costs = {i: cost_of(groups[i], layout) for i in step}
    fill = first_fit if layout.one_row else similar_lengths
    shares = balanced_shares(step, costs, ranks)
    per_rank: list[list[list[int]]] = [fill(share, groups, layout, limit) if share else [[]] for share in shares]
    own, most = per_rank[rank], max(map(len, per_rank))
    while len(own) < most:
        # Split the costliest micro-batch of several groups in two. Only where none has several, one half is empty.
        own.sort(key=lambda batch: (len(batch) < 2, -sum(costs[i] for i in batch)))
        costliest, *others = own
        own = [*balanced_shares(costliest, costs, 2), *others]
    return sorted(own, key=lambda batch: (-sum(costs[i] for i in batch), batch))


def cost_of(group: PromptGroup, layout: Layout) -> float:
    """Return the operations that a group takes, relative to those of one token in the layers."""
    counts = token_counts([group], layout)
    return counts["tokens"] + layout.answer_cost * counts["answer_tokens"] + layout.attended_cost * counts["attended"]


def first_fit(step: Sequence[int], groups: Sequence[PromptGroup], layout: Layout, limit: int) -> list[list[int]]:
    """First-fit decreasing: put each group, from the largest on, into the first micro-batch that has room for it."""
    sizes = {i: count_tokens(groups[i], layout) for i in step}
    batches: list[list[int]] = []
    room: list[int] = []
    for i in sorted(step, key=lambda i: (-sizes[i], i)):
        place = next((place for place, free in enumerate(room) if free >= sizes[i]), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(limit)
        batches[place].append(i)
        room[place] -= sizes[i]
    return batches


def similar_lengths(step: Sequence[int], groups: Sequence[PromptGroup], layout: Layout, limit: int) -> list[list[int]]:
    """Fill micro-batches from the longest group on: as many as fit into ``limit`` when padded to the first's length."""
    pieces = {i: [piece for group in readings(groups[i]) for piece in pieces_of(group, layout)] for i in step}
    longest = {i: max(piece_length(piece, layout) for piece in pieces[i]) for i in step}
    rows = 1 if layout.shared else len(groups[step[0]].answers)
    batches: list[list[int]] = []
    width = 0
    for i in sorted(step, key=lambda i: (-longest[i], i)):
        if not batches or (len(batches[-1]) + 1) * rows * width > limit:
            batches.append([])
            width = longest[i]
        batches[-1].append(i)
    return batches


def balanced_shares(numbers: Sequence[int], costs: dict[int, float], count: int) -> list[list[int]]:
    """Divide groups into ``count`` shares of about the same cost: each, from the costliest on, joins the cheapest."""
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [0.0] * count
    for i in sorted(numbers, key=lambda i: (-costs[i], i)):
        cheapest = totals.index(min(totals))
        shares[cheapest].append(i)
        totals[cheapest] += costs[i]
    return shares


def token_limit(config: Config, longest: int, count: int, most: int = sys.maxsize) -> int:
    """Return how many tokens a micro-batch may have.

    That is ``max_tokens_per_batch``. If it is ``auto``, ``count`` groups of ``longest`` tokens must fit, up to ``most``
    tokens, on a CPU up to ``CPU_TOKENS``; and one group always.

    Raises:
        InputError: a group is longer than the given limit.
    """
    if config.max_tokens_per_batch == "auto":
        return max(longest, min(CPU_TOKENS if dist.device().type == "cpu" else longest * count, most))
    if longest > config.max_tokens_per_batch:
        raise InputError(
            f"max_tokens_per_batch: found {config.max_tokens_per_batch}, but the longest prompt has {longest} tokens "
            "with its answers; expected more, or a lower max_length"
        )
    return config.max_tokens_per_batch


def longest_of(groups: Sequence[PromptGroup], layout: Layout) -> int:
    """Return the number of tokens of the longest group."""
    return max(count_tokens(group, layout) for group in groups)
