"""Covering arrays: few combinations of factor values in which each value, or each pair of values, still occurs."""

import itertools
from collections.abc import Sequence

Row = tuple[int, ...]  # per factor the index of its value


def each_value(sizes: Sequence[int]) -> list[Row]:
    """Combinations in which each value of each factor occurs: as many as the largest factor has values."""
    return [tuple(i % size for size in sizes) for i in range(max(sizes))]


def each_pair(sizes: Sequence[int]) -> list[Row]:
    """Combinations in which each pair of values of two factors occurs; the first of them are ``each_value``'s."""
    rows = each_value(sizes)
    missing = all_pairs(sizes) - covered(rows)
    while missing:
        rows.append(next_row(sizes, missing, turn=len(rows)))
        missing -= pairs_of(rows[-1])
    return rows


def all_pairs(sizes: Sequence[int]) -> set[tuple[Row, Row]]:
    """All pairs of (factor, value), of two factors."""
    values = [[(factor, value) for value in range(size)] for factor, size in enumerate(sizes)]
    return {pair for two in itertools.combinations(values, 2) for pair in itertools.product(*two)}


def pairs_of(row: Sequence[int]) -> set[tuple[Row, Row]]:
    """All pairs of (factor, value) in a combination."""
    return set(itertools.combinations(enumerate(row), 2))


def covered(rows: Sequence[Row]) -> set[tuple[Row, Row]]:
    return set().union(*map(pairs_of, rows))


def next_row(sizes: Sequence[int], missing: set[tuple[Row, Row]], turn: int) -> Row:
    """Begin with the first missing pair, then give each other factor the value that adds most missing pairs.

    Where several add as many, the values take turns.
    """
    chosen = dict(min(missing))
    for factor in sorted({*range(len(sizes))} - {*chosen}):

        def gain(value: int, factor: int = factor) -> int:
            return sum(tuple(sorted([(factor, value), other])) in missing for other in chosen.items())

        size = sizes[factor]
        chosen[factor] = max(((turn + i) % size for i in range(size)), key=gain)
    return tuple(chosen[factor] for factor in range(len(sizes)))
