"""Arguments of several dtypes, and autocast: the backends of a GPU against the oracle in fp64."""

import pytest
import torch

from tests.helpers.mixed_dtypes import FACTORS, HEAD_FACTORS, check_mixed, check_mixed_heads
from tests.helpers.tiers import covering_cases
from tests.kernels.device import DEVICE

# No kernel multiplies fp64: one of hidden and weight is of another dtype, and both of a reward head.
LINEAR = FACTORS | {"weight": [dtype for dtype in FACTORS["weight"] if dtype != torch.float64]}
HEADS = HEAD_FACTORS | {
    name: [dtype for dtype in HEAD_FACTORS[name] if dtype != torch.float64] for name in ("hidden", "head")
}


@pytest.mark.parametrize("factors", covering_cases(LINEAR, drawn=50))
def test_products_are_in_the_less_precise_dtype_and_gradients_in_each_tensors_own(backend, factors):
    check_mixed(factors, backend, DEVICE)


@pytest.mark.parametrize("factors", covering_cases(HEADS, drawn=50))
def test_reward_heads_round_no_argument(factors):
    check_mixed_heads(factors, "triton", DEVICE)
