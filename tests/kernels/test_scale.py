"""A product with a factor on the device: the bits of fp32, rounded once."""

import pytest
import torch

from irlfast.kernels.scale import LANES, scaled
from tests.kernels.device import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1), (3, LANES - 1), (2, LANES), (2, LANES // 2, 3)])
def test_a_product_is_that_of_fp32_rounded_once(shape, dtype):
    torch.manual_seed(0)
    values, factor = torch.randn(shape, device=DEVICE), torch.tensor(-0.3, device=DEVICE)
    torch.testing.assert_close(scaled(values, factor, dtype), (values * factor).to(dtype), rtol=0, atol=0)


def test_values_that_are_not_finite_stay():
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0], device=DEVICE)
    result = scaled(values, torch.tensor(-2.0, device=DEVICE), torch.bfloat16)
    assert result.isinf().tolist() == [True, True, False, False]
    assert result.isnan().tolist() == [False, False, True, False]
