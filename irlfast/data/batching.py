"""Which prompt groups an optimiser step takes, and which of them each process runs together as a micro-batch."""

import sys
from array import array
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
    numbers, costs, sizes = np.sort(step), array("d"), array("q")  # from here on, a group is its place in these
    for i in numbers:
        group = groups[i]
        costs.append(cost_of(group, layout))
        sizes.append(count_tokens(group, layout) if layout.one_row else longest_piece(group, layout))

    def filled(share: Sequence[int]) -> list[list[int]]:
        if not share:
            return [[]]
        if layout.one_row:
            return first_fit(share, sizes, limit)
        rows = 1 if layout.shared else len(groups[numbers[share[0]]].answers)
        return similar_lengths(share, sizes, limit // rows)

    per_rank = [filled(share) for share in balanced_shares(range(len(costs)), costs, ranks)]
    own, most = per_rank[rank], max(map(len, per_rank))
    while len(own) < most:
        # Split the costliest micro-batch of several groups in two. Only where none has several, one half is empty.
        own.sort(key=lambda batch: (len(batch) < 2, -sum(costs[i] for i in batch)))
        costliest, *others = own
        own = [*map(list, balanced_shares(costliest, costs, 2)), *others]
    own.sort(key=lambda batch: (-sum(costs[i] for i in batch), batch))
    return [numbers[np.array(batch, np.int64)].tolist() for batch in own]


def cost_of(group: PromptGroup, layout: Layout) -> float:
    """Return the operations that a group takes, relative to those of one token in the layers."""
    counts = token_counts([group], layout)
    return counts["tokens"] + layout.answer_cost * counts["answer_tokens"] + layout.attended_cost * counts["attended"]


def longest_piece(group: PromptGroup, layout: Layout) -> int:
    """Return the tokens of the longest row that a group takes."""
    return max(piece_length(piece, layout) for read in readings(group) for piece in pieces_of(read, layout))


def descending(numbers: Sequence[int], values: array) -> Sequence[int]:
    """Return the numbers in the order of their values, from the largest on, equal ones in their own order."""
    ascending = np.sort(np.array(numbers, np.int64))
    return ascending[np.argsort(-np.asarray(values)[ascending], kind="stable")].data


def first_fit(share: Sequence[int], sizes: array, limit: int) -> list[list[int]]:
    """First-fit decreasing: put each group, from the largest on, into the first micro-batch that has room for it."""
    batches: list[list[int]] = []
    room: list[int] = []
    for i in descending(share, sizes):
        place = next((place for place, free in enumerate(room) if free >= sizes[i]), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(limit)
        batches[place].append(i)
        room[place] -= sizes[i]
    return batches


def similar_lengths(share: Sequence[int], sizes: array, limit: int) -> list[list[int]]:
    """Fill micro-batches from the longest group on: as many as fit into ``limit`` when padded to the first's length."""
    batches: list[list[int]] = []
    width = 0
    for i in descending(share, sizes):
        if not batches or (len(batches[-1]) + 1) * width > limit:
            batches.append([])
            width = sizes[i]
        batches[-1].append(i)
    return batches


def balanced_shares(numbers: Sequence[int], costs: array, count: int) -> list[array]:
    """Divide groups into ``count`` shares of about the same cost: each, from the costliest on, joins the cheapest."""
    shares = [array("q") for _ in range(count)]
    totals = [0.0] * count
    for i in descending(numbers, costs):
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
