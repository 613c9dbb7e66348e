"""Entropy and log-sum-exp per token, and their gradients, of a backend against the oracle in fp64."""

from typing import Any

import torch

from irlfast import ops
from tests.helpers.ops_cases import converted, gradients, make

LENGTHS = [5, 3, 0, 7, 1, 0, 4, 6]
TOKENS = sum(LENGTHS)
LOGITS_FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "vocabulary": [1, 7, 1000, 4100],
    "softcap": [None, 2.0, 30.0],
    "scale": [1.0, -0.7, 0.0],
    "inplace": [False, True],
    "spread": [3.0, 30.0],
}
FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "vocabulary": [1, 7, 1000, 4100],
    "size": [8, 64],
    "rows": [False, True],
    "bias": [False, True],
    "softcap": [None, 2.0, 30.0],
    "scale": [1.0, -0.7],
    "ignored": [False, True],
    "reference": ["none", "hidden", "token", "sequence"],
    "frozen": [False, True],
    "rows_in_buffer": [1, 9, 10**6],
}


def weights(device: str) -> torch.Tensor:
    """Upstream gradients of log-probability, entropy and log-sum-exp, ``[3, N]``; some are 0."""
    random = torch.Generator().manual_seed(3)
    values = torch.randn(3, TOKENS, generator=random)
    return (values * (torch.rand(3, TOKENS, generator=random) < 0.8)).to(device)


def check_logits(factors: dict[str, Any], backend: str, device: str) -> None:
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(TOKENS, factors["vocabulary"], generator=random) * factors["spread"]).to(factors["dtype"])
    logits = logits.to(device).requires_grad_()
    targets = torch.randint(factors["vocabulary"], (TOKENS,), generator=random).to(device)
    targets[3] = -100
    options = {"logit_scale": factors["scale"], "logit_softcap": factors["softcap"]}
    double = logits.detach().double().requires_grad_()
    expected = ops.token_statistics(double, targets, **options, backend="plain")
    actual = ops.token_statistics(
        logits.clone(), targets, **options, backend=backend, inplace_backward=factors["inplace"]
    )
    check_values(actual, expected)
    upstream = weights(device)
    [gradient] = torch.autograd.grad(list(actual), logits, list(upstream))
    [exact] = torch.autograd.grad(list(expected), double, list(upstream.double()))
    assert gradient.dtype == logits.dtype
    bound = exact.abs() * torch.finfo(logits.dtype).eps / 2 * 1.01 + exact.abs().max() * 3e-5 + 1e-7
    assert ((gradient.double() - exact).abs() <= bound).all()


def check_hidden(factors: dict[str, Any], backend: str, device: str) -> None:
    case = make(LENGTHS, **{name: value for name, value in factors.items() if name != "rows_in_buffer"})
    case = {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in case.items()
    }
    double = converted(case, torch.float64)
    expected = ops.log_ratio(**double, backend="plain", token_statistics=True)
    buffer_mb = factors["rows_in_buffer"] * factors["vocabulary"] * 4 / 2**20
    actual = ops.log_ratio(**case, backend=backend, buffer_mb=buffer_mb, token_statistics=True)
    check_values(actual, expected)
    upstream = weights(device)

    def weighted(result: ops.LogRatio, dtype: torch.dtype) -> torch.Tensor:
        tokens = torch.stack([result.token_logps, result.token_entropy, result.token_lse])
        return (tokens * upstream.to(dtype)).sum() + result.log_ratio.square().sum()

    exact = gradients(weighted(expected, torch.float64), double)
    for name, gradient in gradients(weighted(actual, torch.float32), case).items():
        assert gradient.dtype == case[name].dtype
        half_ulp, largest = torch.finfo(gradient.dtype).eps / 2, exact[name].abs().max()
        # Products in 16 bits round both operands; the sum is rounded once more.
        bound = exact[name].abs() * half_ulp * 1.01 + largest * (
            1e-4 + (0 if gradient.dtype.itemsize == 4 else 2 * half_ulp)
        )
        assert ((gradient.double() - exact[name]).abs() <= bound + 1e-7).all(), name


def check_values(actual: Any, expected: Any) -> None:
    for name, value in expected._asdict().items():
        result = getattr(actual, name)
        assert result.dtype == torch.float32
        torch.testing.assert_close(
            result.double(), value, rtol=1e-5, atol=3e-5, msg=lambda text, of=name: f"{of}: {text}"
        )
