"""Arguments of ``token_divergence``, and the check of a backend against the oracle in fp64."""

from typing import Any

import torch

from irlfast import ops
from tests.helpers.mixed_dtypes import BF16, FP16, FP32, FP64, autocast, dtype_of_products
from tests.helpers.ops_cases import converted, gradients

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl")
TOP_K = {
    "all": {},
    "reference's, others as one": {"top_k": 5},
    "reference's, renormalised": {"top_k": 5, "tail": False},
    "policy's, others as one": {"top_k": 3, "top_k_of": "policy"},
    "policy's, renormalised": {"top_k": 3, "top_k_of": "policy", "tail": False},
    "the first": {"top_k": 1},
}
# Every factor that the backends must agree on.
FACTORS = {
    "kind": KINDS,
    "share": [0.5, 0.1, 0.97],  # beta and alpha
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "vocabulary": [1, 7, 1000, 32000],
    "size": [8, 64],
    "rows": ["none", "both", "reference"],
    "bias": [False, True],
    "scale": [1.0, -0.3],
    "softcap": [None, 2.0, 30.0],
    "ref_softcap": ["same", None, 20.0],
    "temperature": [1.0, 0.5, 3.0],
    "top_k": list(TOP_K),
    "frozen": [False, True],
    "rows_in_buffer": [1, 3, 10**6],
}


def make(
    *,
    kind: str = "forward_kl",
    share: float = 0.5,
    dtype: torch.dtype = torch.float64,
    vocabulary: int = 7,
    size: int = 8,
    count: int = 10,
    rows: str = "none",
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | str | None = "same",
    temperature: float = 1.0,
    top_k: str = "all",
    frozen: bool = False,
    rows_in_buffer: float = 10**6,
    seed: int = 0,
) -> dict[str, Any]:
    """Logits spread over a few nats, and a reference of another hidden size."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * spread).to(dtype)

    height = {"none": count, "both": count // 2 + 1, "reference": count}[rows]  # some rows are used twice
    ref_height = count // 2 + 3 if rows == "reference" else height
    case = {
        "hidden": normal(height, size).requires_grad_(),
        "weight": normal(vocabulary, size, spread=2 * size**-0.5).requires_grad_(not frozen),
        "bias": normal(vocabulary).requires_grad_(not frozen) if bias else None,
        "ref_hidden": normal(ref_height, size + 3),
        "ref_weight": normal(vocabulary, size + 3, spread=2 * size**-0.5),
        "ref_bias": normal(vocabulary) if bias else None,
        "kind": kind,
        "beta": share,
        "alpha": share,
        "logit_scale": scale,
        "logit_softcap": softcap,
        "temperature": temperature,
        "buffer_mb": rows_in_buffer * vocabulary * 2 * max(dtype.itemsize, 4) / 2**20,
        **TOP_K[top_k],
    }
    if ref_softcap != "same":
        case["ref_logit_softcap"] = float("inf") if ref_softcap is None else ref_softcap
    if rows == "both":
        case["rows"] = torch.randint(height, (count,), generator=random)
    elif rows == "reference":
        case["ref_rows"] = torch.randint(ref_height, (count,), generator=random)
    return case


def identical(case: dict[str, Any]) -> dict[str, Any]:
    """The case with the policy as its own reference."""
    same = {f"ref_{name}": case[name] for name in ("hidden", "weight", "bias")}
    return {name: value for name, value in case.items() if name not in ("ref_rows", "ref_logit_softcap")} | same


def check_against_fp64(case: dict[str, Any], backend: str, narrow_products: bool = False) -> None:
    """With ``narrow_products``, the factors of the products of the gradients are rounded to the dtype of the case."""
    upstream = torch.randn(10, generator=torch.Generator().manual_seed(1)).to(case["hidden"].device)
    double = converted(case, torch.float64)
    expected = ops.token_divergence(**double, backend="plain")
    result = ops.token_divergence(**case, backend=backend)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-6)
    assert (result > -1e-6).all()
    exact = gradients(expected @ upstream.double(), double)
    for name, gradient in gradients(result @ upstream, case).items():
        assert gradient.dtype == case[name].dtype
        # Rounded once to the tensor's dtype, after sums in fp32.
        half_ulp, largest = torch.finfo(case[name].dtype).eps / 2, exact[name].abs().max()
        bound = exact[name].abs() * half_ulp * 1.01 + largest * 5e-5 + 1e-7
        if narrow_products:  # two factors of every term were rounded too; terms are larger than their sum
            bound += largest * half_ulp * 2
        assert ((gradient.double() - exact[name]).abs() <= bound).all(), name


DTYPES: dict[str, list[Any]] = {
    "hidden": [FP32, BF16, FP16, FP64],
    "weight": [BF16, FP32, FP64, FP16],
    "bias": [FP32, BF16, FP64, FP16],
    "reference": [BF16, FP32, FP16, FP64],
    "autocast": [None, BF16, FP16],
    "frozen": [False, True],
}


def check_mixed(factors: dict[str, Any], backend: str, device: str) -> None:
    """Each argument in a dtype of its own: the operands are rounded to one dtype, and nothing else is."""
    case, products = make(kind="jensen_shannon", bias=True, vocabulary=40), dtype_of_products(factors)
    for name in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        trained = name in ("hidden", "bias") or (name == "weight" and not factors["frozen"])
        dtype = factors["reference" if name.startswith("ref_") else name]
        case[name] = case[name].detach().to(device, dtype).requires_grad_(trained)
    operands = {
        name: case[name].detach().to(products).requires_grad_(case[name].requires_grad)
        for name in ("hidden", "weight", "ref_hidden", "ref_weight")
    }
    double = converted(case | operands, FP64)
    expected = ops.token_divergence(**double, backend="plain")
    with autocast(factors["autocast"], device):
        actual = ops.token_divergence(**case, backend=backend)
    assert actual.dtype == torch.promote_types(products, FP32)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6)
    wanted = gradients(expected.sum(), double)
    for name, gradient in gradients(actual.sum(), case).items():
        assert gradient.dtype == case[name].dtype, name
        # Products in 16 bits round both operands; the sum is rounded to the tensor's dtype.
        ulp = torch.finfo(products).eps if products in (BF16, FP16) else 0
        bound = wanted[name].abs() * torch.finfo(gradient.dtype).eps + wanted[name].abs().max() * (1e-4 + ulp) + 1e-7
        assert ((gradient.double() - wanted[name]).abs() <= bound).all(), name
