"""token_logps and logits_log_ratio under torch's opcheck, torch.compile, autocast and activation checkpointing."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from irlfast import ops
from irlfast.ops.logits import custom_op
from tests.ops.test_logits import BACKENDS, LENGTHS, REFERENCES, make


@pytest.mark.parametrize("options", [(1.0, None), (0.5, 30.0)], ids=str)
@pytest.mark.parametrize("reference", [False, True])
def test_torch_accepts_the_registered_operations(reference, options):
    case = make(LENGTHS, 7, torch.float32, reference="logits")
    logits, targets = case["logits"], case["targets"]
    ref_logits = case["ref_logits"] if reference else None
    torch.library.opcheck(custom_op.forward, (logits, targets, ref_logits, *options, False, "cpu"))
    rest = logits.detach(), targets, torch.empty(0), torch.randn(sum(LENGTHS)), *options, "cpu"
    torch.library.opcheck(custom_op.write_gradient, (torch.empty_like(logits), *rest))


@pytest.mark.parametrize("inplace", [False, True])  # which compiled code does not do, and must not suffer from
@pytest.mark.parametrize("reference", REFERENCES)
def test_compiles_as_one_graph_of_any_length(reference, inplace):
    def loss(case: dict[str, Any], inplace: bool) -> torch.Tensor:
        result = ops.logits_log_ratio(**case, logit_softcap=30.0, inplace_backward=inplace)
        logps = ops.token_logps(case["logits"], case["targets"], inplace_backward=inplace)
        return result.log_ratio.square().sum() - result.policy_logps[0] + logps.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in (LENGTHS, [2, 4, 5]):
        case = make(lengths, 9, torch.float32, reference=reference)
        with torch._dynamo.config.patch(error_on_recompile=True):
            expected, actual = loss(case, False), compiled(case, inplace)
        [exact], [gradient] = (torch.autograd.grad(x, case["logits"]) for x in (expected, actual))
        assert torch.equal(actual, expected) and torch.equal(gradient, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, backend):
    case = make(LENGTHS, 7, dtype, reference="logits")
    expected = ops.logits_log_ratio(**case, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        result = ops.logits_log_ratio(**case, backend=backend)
        assert torch.equal(ops.token_logps(case["logits"], case["targets"], backend=backend), expected.token_logps)
    assert all(torch.equal(one, other) for one, other in zip(expected[:4], result[:4], strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_checkpointing_changes_no_bit(inplace):
    hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.token_logps(hidden @ weight.T, torch.arange(6), inplace_backward=inplace).sum()

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    again = torch.autograd.grad(checkpoint(loss, hidden, weight, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
