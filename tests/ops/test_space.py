"""Every operation on a CPU, on inputs drawn from the space that :mod:`tests.helpers.space` describes."""

import pytest

from tests.helpers.space import OPERATIONS, SETTINGS, check_call
from tests.helpers.tiers import covering_cases

CALLS = [
    pytest.param(name, *case.values, marks=case.marks, id=f"{name}, {case.id}")
    for name, operation in OPERATIONS.items()
    for case in covering_cases(operation.factors | SETTINGS, drawn=100)
]


@pytest.mark.parametrize(("name", "factors"), CALLS)
@pytest.mark.parametrize("backend", ["plain", "cpu"])
def test_layouts_in_memory_and_settings_of_the_process_change_no_result(backend, name, factors):
    check_call(name, factors, backend, "cpu")
