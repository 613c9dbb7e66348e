"""token_divergence on a GPU: Triton against the oracle in fp64, and documented properties."""

import pytest
import torch

from irlfast import ops
from tests.helpers.divergence_cases import (
    DTYPES,
    FACTORS,
    KINDS,
    TOP_K,
    check_against_fp64,
    check_mixed,
    identical,
    make,
)
from tests.helpers.ops_cases import converted, gradients
from tests.helpers.tiers import covering_cases, full, sweep
from tests.kernels.device import DEVICE, on_device

# No kernel multiplies fp64: one of hidden and weight is of another dtype.
NO_FP64 = DTYPES | {"weight": [dtype for dtype in DTYPES["weight"] if dtype != torch.float64]}
SMALL = FACTORS | {"vocabulary": [1, 7, 1000, 4100]}


@pytest.mark.parametrize("factors", covering_cases(SMALL, beyond=full, drawn=60))
def test_matches_the_oracle_in_fp64(factors):
    check_against_fp64(on_device(make(**factors)), "triton", narrow_products=factors["dtype"] != torch.float32)


@pytest.mark.parametrize("factors", covering_cases(NO_FP64, beyond=full, drawn=30))
def test_products_are_in_the_less_precise_dtype_and_gradients_in_each_tensors_own(factors):
    check_mixed(factors, "triton", DEVICE)


@full  # the interpreter takes seconds for each
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_vocabulary_matches_the_oracle_in_fp64(kind):
    case = make(kind=kind, share=0.3, vocabulary=50304, dtype=torch.bfloat16, bias=True)
    check_against_fp64(on_device(case), "triton", narrow_products=True)


@sweep(kind=KINDS, top_k=TOP_K, dtype=[torch.float32, torch.bfloat16], share=[0.5, 0.1, 0.3])
def test_equal_distributions_have_divergence_0_and_no_gradient(kind, top_k, dtype, share):
    case = make(kind=kind, share=share, top_k=top_k, dtype=dtype, vocabulary=100, count=4, bias=True)
    case = on_device(identical(case | {"logit_scale": 1.1, "logit_softcap": 30.0}))
    result = ops.token_divergence(**case, backend="triton")
    assert result.eq(0).all()
    assert not any(gradient.any() for gradient in gradients(result.sum(), case).values())


def test_derivatives_far_below_fp16s_range_reach_the_weight():
    """Near the reference, derivatives by the logits are 1e-8 and less: fp16 has no number below 6e-8."""
    case = identical(make(kind="jensen_shannon", dtype=torch.float16, vocabulary=1000, size=64))
    case = on_device(case)
    case["ref_hidden"] = case["hidden"].detach() * 1.001
    double = converted(case, torch.float64)
    exact = ops.token_divergence(**double, backend="plain")
    result = ops.token_divergence(**case, backend="triton")
    factor = 1000.0  # of the loss, as a scaler of gradients has it: the results are fp16 too
    expected = gradients(factor * exact.sum(), double)
    for name, gradient in gradients(factor * result.sum(), case).items():
        assert (gradient.double() - expected[name]).norm() <= 0.01 * expected[name].norm(), name


def test_logits_of_10000_give_no_nan():
    for kind in KINDS:
        case = on_device(make(kind=kind, dtype=torch.float32, vocabulary=40))
        case["hidden"] = (case["hidden"] * 3e3).detach().requires_grad_()
        case["ref_hidden"] = case["ref_hidden"] * 3e3
        result = ops.token_divergence(**case, backend="triton")
        expected = ops.token_divergence(**converted(case, torch.float64), backend="plain")
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-2)  # an ulp of 1e4 is 1e-3
        assert all(gradient.isfinite().all() for gradient in gradients(result.sum(), case).values())


def test_a_nan_in_one_row_stays_there():
    case = on_device(make(dtype=torch.float32, kind="jensen_shannon", vocabulary=100))
    clean = ops.token_divergence(**case, backend="triton")
    hidden = case["hidden"].detach().clone()
    hidden[3] = float("nan")
    result = ops.token_divergence(**case | {"hidden": hidden}, backend="triton")
    others = torch.arange(10, device=DEVICE) != 3
    assert torch.equal(result[others], clean[others]) and result[3].isnan()


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("vocabulary", [1, 3])
def test_no_row_and_a_vocabulary_of_one_token_work(vocabulary, count):
    case = on_device(make(vocabulary=vocabulary, count=count, bias=True, dtype=torch.float32))
    result = ops.token_divergence(**case, backend="triton")
    assert result.shape == (count,) and (vocabulary > 1 or not result.any())
    assert all(gradient.isfinite().all() for gradient in gradients(result.sum(), case).values())
