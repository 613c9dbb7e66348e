"""The matrix product of ``irlfast._cpu`` against fp64: layouts of the operands, numbers of threads, errors."""

import pytest
import torch

from irlfast import native, ops
from irlfast.ops.pair_loss import cpu_slab
from tests.helpers.ops_cases import gradients, make
from tests.helpers.tiers import covering_cases

pytestmark = pytest.mark.skipif(not hasattr(native.cpu, "multiply"), reason="PyTorch multiplies on this processor")

DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = ["rows", "columns", "rows of a wider matrix", "one row repeated", "every other element"]
SIZES = [1, 7, 16, 49, 300, 1030]  # a lane, a part of a line, a line, a part of a tile, a part of a block, several
FACTORS = {
    "m": SIZES,
    "n": SIZES,
    "k": SIZES,
    "layout_a": LAYOUTS,
    "layout_b": LAYOUTS,
    "dtype_a": DTYPES,
    "dtype_b": DTYPES,
    "by_columns": [False, True],
    "add": [False, True],
    "narrow": [False, True],
    "threads": [1, 2, 5],
}


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    memory = torch.randn(2 * rows, 2 * columns, generator=random).to(dtype)
    if layout == "rows":
        return memory[:rows, :columns].contiguous()
    if layout == "columns":
        return memory[:rows, :columns].T.contiguous().T
    if layout == "one row repeated":
        return memory[0, :columns].expand(rows, columns)
    return memory[:rows, 1 : columns + 1] if layout == "rows of a wider matrix" else memory[::2, ::2]


def product(a: torch.Tensor, b: torch.Tensor, **options: bool) -> torch.Tensor:
    out = torch.zeros(len(a), b.shape[1])
    cpu_slab.native_product(a, b, out, **options)
    return out


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("factors", covering_cases(FACTORS, drawn=500))
def test_the_product_matches_fp64_and_writes_nothing_else(factors, threads):
    m, n, k = (factors[name] for name in "mnk")
    random = torch.Generator().manual_seed(m * n * k)
    a = matrix(m, k, factors["layout_a"], factors["dtype_a"], random)
    b = matrix(k, n, factors["layout_b"], factors["dtype_b"], random)
    narrow = factors["narrow"] or torch.bfloat16 in (a.dtype, b.dtype)
    memory = torch.randn((n, m + 3) if factors["by_columns"] else (m, n + 3), generator=random)
    whole = memory.T if factors["by_columns"] else memory
    before, out = whole.clone(), whole[:m, :n]
    threads(factors["threads"])
    cpu_slab.native_product(a, b, out, narrow=narrow, add=factors["add"])
    a, b = (each.bfloat16() if narrow else each for each in (a, b))
    exact = a.double() @ b.double() + factors["add"] * before[:m, :n]
    terms = a.double().abs() @ b.double().abs() + 1
    assert ((out - exact).abs() <= terms * 2e-7 * (2 + k**0.5)).all()
    out.copy_(before[:m, :n])
    assert torch.equal(whole, before)


@pytest.mark.parametrize("narrow", [False, True])
def test_threads_and_neighbours_change_no_bit(narrow, threads):
    """A policy that equals its reference has a log-ratio of exactly 0, in whatever chunk its tokens are."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=random) for shape in ((300, 700), (700, 900)))
    results = []
    for number in (1, 2, 7):
        threads(number)
        results.append(product(a, b, narrow=narrow))
    parts = torch.cat([product(part, b, narrow=narrow) for part in a.split(77)])
    assert all(torch.equal(result, results[0]) for result in (*results, parts))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_a_value_that_is_not_finite_in_bf16_stays_in_its_row_and_column(value):
    a, b = torch.randn(20, 40), torch.randn(40, 60)
    clean = product(a, b, narrow=True)
    a[3, 5] = value
    b[7, 50] = value
    broken = product(a, b, narrow=True)
    assert not broken[3].isfinite().any() and not broken[:, 50].isfinite().any()
    others = torch.ones(20, 60, dtype=torch.bool)
    others[3], others[:, 50] = False, False
    assert torch.equal(broken[others], clean[others])


def test_no_columns_to_sum_over_give_zeros():
    a, b = torch.zeros(3, 0), torch.zeros(0, 5)
    out = torch.ones(3, 5)
    cpu_slab.native_product(a, b, out, narrow=False)
    assert torch.equal(out, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_by_pytorchs_products_are_as_near(dtype, monkeypatch):
    """A machine without this product gets PyTorch's, with the same roundings."""
    case = make([60, 30, 0, 70], vocabulary=3000, dtype=dtype, bias=True, rows=True, reference="hidden")
    actual = ops.pair_loss(**case, beta=0.3)
    ours = gradients(actual.loss, case)
    monkeypatch.delattr(native.cpu, "multiply")
    expected = ops.pair_loss(**case, beta=0.3)
    torch.testing.assert_close(actual.log_ratio, expected.log_ratio, rtol=1e-5, atol=3e-5)
    for name, gradient in gradients(expected.loss, case).items():
        unit = 1e-4 if dtype == torch.float32 else 2**-7
        assert (gradient - ours[name]).abs().max() <= gradient.abs().max() * unit


def test_the_binding_checks_what_it_is_given():
    address = torch.zeros(64).data_ptr()
    fp32, bf16, sizes = (address, "float32", 4, 1), (address, "bfloat16", 4, 1), (2, 4, 4, 4, False, False)
    for a, b, of, message in (
        ((0, "float32", 4, 1), fp32, sizes, "a: found a null pointer"),
        (fp32, (address + 2, "float32", 4, 1), sizes, "b: found an address that is not aligned"),
        (fp32, bf16, sizes, "b: found dtype bfloat16, expected float32"),
        ((address, "float64", 4, 1), fp32, sizes, "a: found dtype float64, expected float32"),
        ((address, "float32", 4, 2), fp32, sizes, "a: found elements 4 and 2 apart, expected one of the two to be 1"),
        ((address, "float32", -4, 1), fp32, sizes, "a: found elements -4 and 1 apart"),
        (fp32, fp32, (2, 4, 4, 3, False, False), "out: found rows 3 apart, expected at least n"),
        (fp32, fp32, (2, 4, -1, 4, False, False), "product: found sizes 2, 4, -1"),
    ):
        with pytest.raises(ValueError, match=message):
            native.cpu.multiply(a, b, address, of, 1)
