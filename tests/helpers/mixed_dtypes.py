"""Each floating argument of an operation in a dtype of its own, and autocast: the result is held against fp64."""

import contextlib
from typing import Any

import torch

from irlfast import ops
from tests.helpers.ops_cases import converted, gradients, make, sequences

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PRECISION = [FP64, FP32, FP16, BF16]  # from the most to the least precise
ARGUMENTS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "ref_logps")
LENGTHS = [5, 3, 0, 7, 1, 0, 4, 6]

FACTORS: dict[str, list[Any]] = {
    "hidden": [FP32, BF16, FP16, FP64],
    "weight": [BF16, FP32, FP64, FP16],
    "bias": [FP32, BF16, FP64, FP16, None],
    "reference": [None, FP32, BF16, FP64, FP16, "ref_logps"],  # the dtype of ref_hidden, or a cached reference
    "ref_weight": [BF16, FP32, FP16, FP64],
    "autocast": [None, BF16, FP16],
    "frozen": [False, True],
    "operation": ["pair_loss", "log_ratio"],
}


def autocast(dtype: torch.dtype | None, device: str) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def dtype_of_products(factors: dict[str, Any]) -> torch.dtype:
    """Return the less precise dtype of hidden and weight; autocast replaces every dtype but fp64."""
    dtypes = [
        factors[name] if factors["autocast"] is None or factors[name] == FP64 else factors["autocast"]
        for name in ("hidden", "weight")
    ]
    return PRECISION[max(map(PRECISION.index, dtypes))]


def mixed_case(factors: dict[str, Any], device: str) -> dict[str, Any]:
    """Arguments of ``log_ratio`` as new leaves, each in its dtype."""
    cached = factors["reference"] == "ref_logps"
    reference = "token" if cached else "none" if factors["reference"] is None else "hidden"
    case = make(LENGTHS, vocabulary=40, size=8, bias=factors["bias"] is not None, rows=True, reference=reference)
    dtypes = {"hidden": factors["hidden"], "weight": factors["weight"], "bias": factors["bias"]}
    if reference != "none":
        dtypes |= dict.fromkeys(("ref_hidden", "ref_bias"), factors["reference"])
        dtypes |= {"ref_weight": factors["ref_weight"], "ref_logps": factors["ref_weight"]}
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            trained = name in ("hidden", "bias") or (name == "weight" and not factors["frozen"])
            case[name] = value.detach().to(device, dtypes.get(name) or value.dtype).requires_grad_(trained)
    return case


def rounded(case: dict[str, Any], products: torch.dtype) -> dict[str, Any]:
    """The values that the operation computes with, in fp64. The reference is in the dtype of the policy's products."""
    operands = {name: case[name].detach().to(products) for name in ("hidden", "weight")}
    operands |= {name: case[name].to(products) for name in ("ref_hidden", "ref_weight") if name in case}
    operands = {name: value.requires_grad_(case[name].requires_grad) for name, value in operands.items()}
    return converted(case | operands, FP64)


def statistic(operation: str, case: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-ratios, and a scalar to differentiate."""
    if operation == "pair_loss":
        result = ops.pair_loss(**case, beta=0.3, nll_weight=0.2, **options)
        return result.log_ratio, result.loss
    ratio = ops.log_ratio(**case, **options).log_ratio
    return ratio, ratio.square().sum()


def check_mixed(factors: dict[str, Any], backend: str, device: str) -> None:
    case, products = mixed_case(factors, device), dtype_of_products(factors)
    double = rounded(case, products)
    expected, exact = statistic(factors["operation"], double, backend="plain")
    with autocast(factors["autocast"], device):
        actual, loss = statistic(factors["operation"], case, backend=backend)
    assert actual.dtype == torch.promote_types(products, FP32)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=3e-5)
    wanted = gradients(exact, double)
    for name, gradient in gradients(loss, case).items():
        assert gradient.dtype == case[name].dtype, name
        # Products in 16 bits round both operands; the sum is rounded to the tensor's dtype.
        ulp = torch.finfo(products).eps if products in (BF16, FP16) else 0
        bound = wanted[name].abs() * torch.finfo(gradient.dtype).eps + wanted[name].abs().max() * (1e-4 + ulp) + 1e-9
        assert ((gradient.double() - wanted[name]).abs() <= bound).all(), name


HEAD_FACTORS: dict[str, list[Any]] = {
    "hidden": [BF16, FP32, FP16, FP64],
    "head": [FP32, BF16, FP16, FP64],
    "bias": [FP32, BF16, FP64, FP16, None],
    "autocast": [None, BF16, FP16],
    "pooling": ["last", "token"],
}


def check_mixed_heads(factors: dict[str, Any], backend: str, device: str) -> None:
    """Reward heads round nothing: all values count as they are."""
    random = torch.Generator().manual_seed(0)
    shapes = {"hidden": (sum(LENGTHS), 8), "head": (3, 8), "bias": (3,)}
    case = {
        name: torch.randn(shape, generator=random).to(device, factors[name]).requires_grad_()
        for name, shape in shapes.items()
        if factors[name] is not None
    }
    sequence = {"cu_seqlens": sequences(LENGTHS).to(device), "pooling": factors["pooling"]}
    labels = torch.tensor([1, 0] * 4, device=device)
    double = {name: value.detach().double().requires_grad_() for name, value in case.items()}

    def both(case: dict[str, Any], backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits, and a scalar of the results of both operations."""
        result = ops.discriminator_loss(**case, **sequence, labels=labels, kind="gail", backend=backend)
        logits = ops.reward_head(**case, **sequence, backend=backend)
        assert torch.equal(logits, result.logits)
        return logits, result.loss + logits.square().sum()

    expected, exact = both(double, "plain")
    with autocast(factors["autocast"], device):
        actual, loss = both(case, backend)
    assert actual.dtype == (FP64 if FP64 in (factors["hidden"], factors["head"]) else FP32)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    wanted, computed = (torch.autograd.grad(x, list(c.values())) for x, c in ((exact, double), (loss, case)))
    for name, gradient, right in zip(case, computed, wanted, strict=True):
        assert gradient.dtype == case[name].dtype, name
        bound = right.abs() * torch.finfo(gradient.dtype).eps + right.abs().max() * 1e-4 + 1e-7
        assert ((gradient.double() - right).abs() <= bound).all(), name
