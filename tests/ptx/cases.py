"""Operations whose kernels run as PTX, held against fp64: small problems that reach every loop and pipeline stage.

The bounds are those of fp32 sums. The interpreter adds a tensor core's products more exactly than a GPU does, so it
cannot set a bound: these are the bounds of the same tests on a GPU.
"""

from typing import Any

import torch

from irlfast import ops
from irlfast.ops.logits import custom_op
from tests.helpers import divergence_cases, ops_cases
from tests.helpers.ops_cases import converted, gradients
from tests.ops.test_logits import check_against_fp64
from tests.ops.test_logits import make as make_logits

STATISTICS = ("log_ratio", "policy_logps", "ref_logps", "token_logps")


def check_logits(
    vocabulary: int, dtype: torch.dtype, options: dict[str, float], lengths: list[int], gap: int = 0
) -> None:
    """``logits_log_ratio`` with its gradient, of rows with a ``gap`` of elements between them.

    A row of more than 8 KB takes more than one iteration.
    """
    case = make_logits(lengths, vocabulary, dtype, reference="logits", ignored=False)
    for name in ("logits", "ref_logits"):
        wide = torch.cat([case[name].detach(), torch.full((sum(lengths), gap), float("nan"), dtype=dtype)], dim=1)
        case[name] = wide[:, :vocabulary].requires_grad_(case[name].requires_grad)
    check_against_fp64(case, "triton", **options)


def check_sums(lengths: list[int]) -> None:
    """The sums of sequences: a program adds 1,024 tokens per iteration, in fp64."""
    logps, ref_logps = -10 * torch.rand(2, sum(lengths), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(sum(lengths)) % 5 - 1
    targets[targets < 0] = -100
    logps[targets < 0] = 0
    sums = custom_op.sequence_sums(logps, targets, ops_cases.sequences(lengths), ref_logps, "triton").double()
    both = logps.double(), ref_logps.double().where(targets >= 0, 0)
    policy, reference = (torch.stack([part.sum() for part in values.split(lengths)]) for values in both)
    torch.testing.assert_close(sums, torch.stack([policy - reference, policy, reference]), rtol=2**-23, atol=0)


def check_slab(**factors: Any) -> None:
    """``pair_loss``: the softmax between the products, with the derivatives that it writes over the logits.

    A bias makes the vocabulary's last token the likeliest: a loop that ends too early then loses most of the mass.
    """
    case = ops_cases.make([3, 2], size=8, rows=True, reference="token", **factors)
    if case["bias"] is not None:
        case["bias"].data[-1] = 12
    double = converted(case, torch.float64)
    expected = ops.pair_loss(**double, beta=0.3, backend="plain")
    result = ops.pair_loss(**case, beta=0.3, backend="triton")
    check_statistics(result, expected, names=STATISTICS[:3])
    check_gradients(gradients(result.loss, case), gradients(expected.loss, double), factors["dtype"])


def check_fused(lengths: list[int], **factors: Any) -> None:
    """``log_ratio`` of policy and reference, both from hidden states, in one launch."""
    case = ops_cases.make(lengths, rows=True, reference="hidden", frozen=False, **factors)
    expected = ops.log_ratio(**converted(case, torch.float64), backend="plain")
    check_statistics(ops.log_ratio(**case, backend="triton"), expected)


def check_epilogue(lengths: list[int], **factors: Any) -> None:
    """``pair_loss`` with exponentials in the product's epilogue, and gradient products over the heavy tiles alone.

    A bias makes rare tokens so unlikely that some tiles weigh nothing.
    """
    case = ops_cases.make(lengths, rows=True, bias=True, dtype=torch.bfloat16, **factors)
    case["bias"] = torch.linspace(0, -80, factors["vocabulary"]).bfloat16().requires_grad_()
    case["targets"] = case["targets"] % 64
    double = converted(case, torch.float64)
    expected = ops.pair_loss(**double, beta=0.3, backend="plain")
    result = ops.pair_loss(**case, beta=0.3, backend="triton", skip_mass=1e-12)
    check_statistics(result, expected, names=STATISTICS[:3])
    check_gradients(gradients(result.loss, case), gradients(expected.loss, double), torch.bfloat16)


def check_divergence(**factors: Any) -> None:
    """``token_divergence``: rows longer than 2,048 logits take more than one iteration."""
    case = divergence_cases.make(rows="both", bias=True, **factors)
    divergence_cases.check_against_fp64(case, "triton", narrow_products=factors["dtype"] != torch.float32)


def check_statistics(result: Any, expected: Any, names: tuple[str, ...] = STATISTICS) -> None:
    for name in names:
        actual, exact = getattr(result, name).double(), getattr(expected, name)
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=3e-5)


def check_gradients(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Narrow derivatives are rounded before they are multiplied, and their products once more: two units of 2^-8."""
    for name, gradient in actual.items():
        error, largest = (gradient.double() - exact[name]).abs().max(), exact[name].abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 2**-7) * largest + 1e-9, name
