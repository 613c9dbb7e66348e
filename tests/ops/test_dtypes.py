"""Arguments of several dtypes, and autocast: both backends of a CPU against the oracle in fp64."""

import pytest
import torch

from irlfast import ops
from tests.helpers.mixed_dtypes import FACTORS, HEAD_FACTORS, check_mixed, check_mixed_heads, mixed_case
from tests.helpers.ops_cases import gradients
from tests.helpers.tiers import covering_cases

BACKENDS = ["plain", "cpu"]


@pytest.mark.parametrize("factors", covering_cases(FACTORS, beyond=(), drawn=200))
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_in_the_less_precise_dtype_and_gradients_in_each_tensors_own(backend, factors):
    check_mixed(factors, backend, "cpu")


@pytest.mark.parametrize("factors", covering_cases(HEAD_FACTORS, beyond=(), drawn=100))
@pytest.mark.parametrize("backend", BACKENDS)
def test_reward_heads_round_no_argument(backend, factors):
    check_mixed_heads(factors, backend, "cpu")


def test_an_fp32_weight_under_autocast_gets_a_gradient_that_was_never_in_bf16():
    factors = {name: values[0] for name, values in FACTORS.items()} | {"weight": torch.float32}
    for backend in BACKENDS:
        case = mixed_case(factors, "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            loss = ops.pair_loss(**case, beta=0.3, backend=backend).loss
        gradient = gradients(loss, case)["weight"]
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_one_graph_compiles_for_autocast_and_another_without():
    def loss(case):
        return ops.pair_loss(**case, beta=0.3).loss + ops.log_ratio(**case).log_ratio.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    case = mixed_case({name: values[0] for name, values in FACTORS.items()}, "cpu")
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            expected, actual = loss(case), compiled(case)
        assert torch.equal(actual, expected)
        exact = gradients(expected, case)
        assert all(torch.equal(gradient, exact[name]) for name, gradient in gradients(actual, case).items())
        results.append(actual)
    assert results[0] != results[1]
