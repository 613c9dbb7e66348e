"""The tests' own tools: covering arrays cover, and the modules that runs preload exist."""

import importlib.util
import itertools

import pytest
import torch

from tests.helpers.covering import covered, each_pair, each_value, pairs_of
from tests.helpers.runs import PRELOADED
from tests.helpers.tiers import first_of_each_kind, first_then_full, full_then_slow


@pytest.mark.parametrize("sizes", [[3], [2, 2, 2], [1, 4], [5, 3, 9], [4, 4, 2, 2, 2, 3], [2] * 8], ids=str)
def test_every_value_and_every_pair_of_values_occurs_in_a_covering_array(sizes):
    product = [*itertools.product(*map(range, sizes))]
    every_pair = set().union(*map(pairs_of, product))
    assert all({row[i] for row in each_value(sizes)} == {*range(size)} for i, size in enumerate(sizes))
    rows = each_pair(sizes)
    assert covered(rows) == every_pair
    assert {*each_value(sizes)} <= {*rows} <= {*product} and len({*rows}) == len(rows)


def test_a_covering_array_is_far_smaller_than_the_product():
    assert len(each_pair([5, 3, 9])) <= 50 and len(each_pair([2] * 12)) <= 14


def tiers_of(parameters: list) -> str:
    """Each value, before it its tier: nothing, + of `make test-all`, or - of the nightly sweep."""
    names = {"full": "+", "slow": "-"}
    whole = [each if hasattr(each, "marks") else pytest.param(each) for each in parameters]
    return " ".join("".join(names[mark.name] for mark in each.marks) + each.values[0] for each in whole)


def test_every_value_of_a_test_is_in_one_tier():
    assert tiers_of(first_then_full("abcd")) == "a +b +c +d"
    assert tiers_of(first_then_full("abcd", others=1)) == "a +b -c -d"
    assert tiers_of(first_then_full("ab", others=0)) == "a -b"
    assert tiers_of(full_then_slow("abcd", 2)) == "+a +b -c -d"
    assert tiers_of(first_of_each_kind("aAbBa", str.lower)) == "a -A b -B -a"


@pytest.mark.parametrize("name", [name for name in PRELOADED if name.startswith("irlfast.")])
def test_a_module_that_runs_preload_exists(name):
    assert importlib.util.find_spec(name), "an unknown name would be passed over, and every run be slower"


def test_new_memory_is_nan_until_it_is_written():
    made = torch.empty(2), torch.empty_like(torch.zeros(2)), torch.zeros(2).new_empty(3)
    assert all(tensor.isnan().all() for tensor in made)
    with torch.device("meta"):
        assert torch.empty(2).is_meta
