"""Entropy and log-sum-exp per token by Triton, against the oracle in fp64, and documented properties."""

import pytest
import torch

from irlfast import ops
from tests.helpers.statistics_cases import FACTORS, LOGITS_FACTORS, check_hidden, check_logits
from tests.helpers.tiers import covering_cases, full
from tests.kernels.device import DEVICE


@pytest.mark.parametrize("factors", covering_cases(LOGITS_FACTORS, beyond=full, drawn=60))
def test_statistics_of_logits_match_the_oracle_in_fp64(factors):
    check_logits(factors, "triton", DEVICE)


@pytest.mark.parametrize("factors", covering_cases(FACTORS, beyond=full, drawn=60))
def test_statistics_from_hidden_states_match_the_oracle_in_fp64(factors):
    check_hidden(factors, "triton", DEVICE)


def test_a_sharp_row_has_entropy_0_and_a_flat_one_log_v():
    logits = torch.zeros(3, 1000, device=DEVICE)
    logits[0, 7], logits[1, 7] = 1e4, 100.0
    result = ops.token_statistics(logits, torch.tensor([7, 7, 7], device=DEVICE), backend="triton")
    assert result.entropy[0] == 0 and result.entropy[1].abs() < 1e-30
    torch.testing.assert_close(result.entropy[2], torch.tensor(1000.0, device=DEVICE).log())


def test_a_row_that_nobody_uses_has_no_gradient_whatever_it_holds():
    logits = torch.randn(3, 7, device=DEVICE)
    logits[1] = float("nan")
    logits.requires_grad_()
    result = ops.token_statistics(logits, torch.tensor([1, 2, 3], device=DEVICE), backend="triton")
    assert result.entropy.isnan().tolist() == [False, True, False]
    for value in result:
        [gradient] = torch.autograd.grad(value[[0, 2]].sum(), logits, retain_graph=True)
        assert gradient.isfinite().all() and not gradient[1].any()
