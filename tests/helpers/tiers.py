"""The tier of a test: neither of these marks, `full`, or `slow` (docs/tests.md says what each tier proves)."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from tests.helpers.covering import each_pair, each_value

full = pytest.mark.full  # `make test-all`
slow = pytest.mark.slow  # `make sweep`


def sweep(rest: Any = slow, **factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by every combination of the factors' values, in three tiers.

    `make test` runs combinations in which each value occurs, `make test-all` those in which each pair of values of two
    factors occurs, and ``rest`` marks all the others: `make sweep`.
    """
    values = [list(factor) for factor in factors.values()]
    sizes = [len(factor) for factor in values]
    first, second = each_value(sizes), each_pair(sizes)
    rows = []
    for indices in itertools.product(*map(range, sizes)):
        marks = () if indices in first else full if indices in second else rest
        rows.append(pytest.param(*(factor[i] for factor, i in zip(values, indices, strict=True)), marks=marks))
    return pytest.mark.parametrize(tuple(factors), rows, ids=label)


def covering_cases(factors: dict[str, list[Any]], beyond: Any = full, drawn: int = 0) -> list[Any]:
    """Dictionaries with one value per factor, for products that are too large to run whole.

    Each value of a factor occurs in the first, each pair of values of two factors in those that ``beyond`` marks, and
    the nightly sweep has ``drawn`` random ones.
    """
    sizes = [len(values) for values in factors.values()]
    first, source = each_value(sizes), random.Random(0)
    cases = [
        pytest.param(
            {name: values[i] for (name, values), i in zip(factors.items(), row, strict=True)},
            marks=() if row in first else beyond,
            id=f"covering {number}",
        )
        for number, row in enumerate(each_pair(sizes))
    ]
    for number in range(drawn):
        case = {name: source.choice(values) for name, values in factors.items()}
        cases.append(pytest.param(case, marks=slow, id=f"drawn {number}"))
    return cases


def first_then_full(values: Iterable[Any], others: int | None = None) -> list[Any]:
    """The first value in `make test`, the others in `make test-all`. With ``others``, so many; the rest is nightly."""
    first, *rest = values
    marks = [slow if others is not None and place >= others else full for place in range(len(rest))]
    return [first, *(pytest.param(value, marks=mark) for value, mark in zip(rest, marks, strict=True))]


def full_then_slow(values: Iterable[Any], count: int = 1) -> list[Any]:
    """The first ``count`` values in `make test-all`, the others in the nightly sweep."""
    return [pytest.param(value, marks=full if place < count else slow) for place, value in enumerate(values)]


def first_of_each_kind(values: Iterable[Any], kind_of: Callable[[Any], Any]) -> list[Any]:
    """The first value of each kind in its test's own tier, and those that repeat a kind in the nightly sweep."""
    seen, parameters = set(), []
    for value in values:
        kind = kind_of(value)
        parameters.append(pytest.param(value, marks=slow) if kind in seen else value)
        seen.add(kind)
    return parameters


def label(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def one_run_or_each_its_own(moments: Sequence[str]) -> list[Any]:
    """All moments in one run; in the nightly sweep, also each moment in a run of its own."""
    alone = [pytest.param([moment], marks=slow, id=moment) for moment in moments]
    return [pytest.param(moments, id="one run at every moment"), *alone]
