"""The tier of a test: neither of these marks, `full`, or `slow` (docs/tests.md says what each tier proves)."""

import itertools
import random
from collections.abc import Iterable, Sequence
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


def first_then_full(values: Iterable[Any]) -> list[Any]:
    """The first value in `make test`, the others in `make test-all`."""
    first, *others = values
    return [first, *(pytest.param(value, marks=full) for value in others)]


def label(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def one_run_or_each_its_own(moments: Sequence[str]) -> list[Any]:
    """All moments in one run; in the nightly sweep, also each moment in a run of its own."""
    alone = [pytest.param([moment], marks=slow, id=moment) for moment in moments]
    return [pytest.param(moments, id="one run at every moment"), *alone]
