"""The tests' own tools: covering arrays cover, and the modules that runs preload exist."""

import importlib.util
import itertools

import pytest

from tests.helpers.covering import covered, each_pair, each_value, pairs_of
from tests.helpers.runs import PRELOADED


@pytest.mark.parametrize("sizes", [[3], [2, 2, 2], [1, 4], [5, 3, 9], [4, 4, 2, 2, 2, 3], [2] * 12], ids=str)
def test_every_value_and_every_pair_of_values_occurs_in_a_covering_array(sizes):
    product = [*itertools.product(*map(range, sizes))]
    every_pair = set().union(*map(pairs_of, product))
    assert all({row[i] for row in each_value(sizes)} == {*range(size)} for i, size in enumerate(sizes))
    rows = each_pair(sizes)
    assert covered(rows) == every_pair
    assert {*each_value(sizes)} <= {*rows} <= {*product} and len({*rows}) == len(rows)


def test_a_covering_array_is_far_smaller_than_the_product():
    assert len(each_pair([5, 3, 9])) <= 50 and len(each_pair([2] * 12)) <= 14


@pytest.mark.parametrize("name", [name for name in PRELOADED if name.startswith("irlfast.")])
def test_a_module_that_runs_preload_exists(name):
    assert importlib.util.find_spec(name), "an unknown name would be passed over, and every run be slower"
