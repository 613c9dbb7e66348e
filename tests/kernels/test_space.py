"""Every operation on a GPU, on inputs drawn from the space that :mod:`tests.helpers.space` describes."""

import pytest

from tests.helpers.space import OPERATIONS, SETTINGS, check_call
from tests.helpers.tiers import covering_cases
from tests.kernels.device import DEVICE

WITHOUT_CUDA = (
    *("reward_head", "discriminator_loss", "token_divergence"),
    *("token_statistics", "log_ratio with token_statistics"),
)
CALLS = [
    pytest.param(name, *case.values, marks=case.marks, id=f"{name}, {case.id}")
    for name, operation in OPERATIONS.items()
    for case in covering_cases(operation.factors | SETTINGS, drawn=20)
]


@pytest.mark.parametrize(("name", "factors"), CALLS)
def test_layouts_in_memory_and_settings_of_the_process_change_no_result(backend, name, factors):
    if backend == "cuda" and name in WITHOUT_CUDA:
        pytest.skip("it has no kernels in CUDA C++")
    check_call(name, factors, backend, DEVICE)
