"""Wrong values on a GPU, where they are not checked.

A target outside the vocabulary gives NaN for its row, and changes nothing else. No token that does not exist is read.
"""

import itertools
from typing import Any

import pytest
import torch

from irlfast import ops
from irlfast.ops.common import checks
from irlfast.ops.common.types import IGNORE
from irlfast.ops.logits import custom_op
from tests.helpers.ops_cases import make
from tests.helpers.tiers import covering_cases
from tests.kernels.device import DEVICE, on_device

LENGTHS = [3, 2, 1, 4]
VOCABULARY = 40
# Those beyond 32 bits look like a token, or like a skipped one, in their lower 32 bits.
OUTSIDE = [VOCABULARY, 2**32 + 5, -1, 2**32 + IGNORE, -101, VOCABULARY + 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 48]
FACTORS: dict[str, list[Any]] = {
    "target": OUTSIDE,
    "dtype": [torch.float32, torch.bfloat16],
    "softcap": [None, 3.0],
}
LINEAR = FACTORS | {
    "frozen": [False, True],
    "bias": [False, True],
    "reference": ["none", "hidden", "token"],
    "skip_mass": [0.0, 1e-12],
}
BAD = torch.tensor([0, 6])  # in sequences 0 and 3


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(checks, "values_visible", lambda device: False)


def with_targets(case: dict, target: int) -> dict:
    return case | {"targets": case["targets"].index_fill(0, BAD.to(case["targets"].device), target)}


@pytest.mark.parametrize("factors", covering_cases(LINEAR, drawn=20))
def test_from_hidden_states_only_its_own_row_is_nan(factors, backend):
    names = ("dtype", "softcap", "frozen", "bias", "reference")
    case = on_device(make(LENGTHS, vocabulary=VOCABULARY, size=8, **{name: factors[name] for name in names}))
    good = torch.tensor([n not in BAD for n in range(sum(LENGTHS))], device=DEVICE)
    outside = with_targets(case, factors["target"])
    expected, actual = (ops.log_ratio(**x, backend=backend) for x in (with_targets(case, IGNORE), outside))
    assert actual.token_logps.isnan().tolist() == (~good).tolist()
    assert actual.log_ratio.isnan().tolist() == [True, False, False, True]
    torch.testing.assert_close(actual.token_logps[good], expected.token_logps[good], rtol=1e-6, atol=1e-6)
    right, gradient = (torch.autograd.grad(x.token_logps[good].sum(), case["hidden"])[0] for x in (expected, actual))
    torch.testing.assert_close(gradient[good], right[good], rtol=1e-2, atol=1e-5)
    pairs = ops.pair_loss(**outside, beta=0.3, backend=backend, skip_mass=factors["skip_mass"])
    assert pairs.log_ratio.isnan().tolist() == [True, False, False, True]
    torch.autograd.grad(pairs.loss, case["hidden"])


@pytest.mark.parametrize("factors", covering_cases(FACTORS | {"inplace": [False, True]}, drawn=20))
def test_from_logits_only_its_own_row_is_nan(factors, backend):
    random = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    logits = torch.randn(tokens, VOCABULARY, generator=random).to(DEVICE, factors["dtype"])
    case = {"targets": torch.randint(VOCABULARY, (tokens,), generator=random).to(DEVICE)}
    good = torch.tensor([n not in BAD for n in range(tokens)], device=DEVICE)
    options = {"logit_softcap": factors["softcap"], "inplace_backward": factors["inplace"], "backend": backend}
    results = []
    for target in (0, factors["target"]):
        leaf = logits.clone().requires_grad_()
        logps = ops.token_logps(leaf, **with_targets(case, target), **options)
        results.append((logps, *torch.autograd.grad(logps.sum(), leaf)))
    (expected, right), (actual, gradient) = results
    assert actual.isnan().tolist() == (~good).tolist()
    assert torch.equal(actual[good], expected[good])
    assert torch.equal(gradient[good], right[good])
    assert not (gradient[~good] > 0).any()  # no token is scored in the place of the target


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ends", [[-3, 4, 10], [0, 4, 13], [-7, -2, 20], [12, 15, 9], [5, 2, 10], [0, 20, -4]])
def test_sums_of_sequences_read_no_token_that_does_not_exist(ends, per_token, backend):
    tokens, bounds = sum(LENGTHS), torch.tensor(ends).clamp(0, sum(LENGTHS)).tolist()
    around = torch.full((3 * tokens,), float("nan"), device=DEVICE)
    policy, reference = around.clone()[tokens : 2 * tokens], around.clone()[tokens : 2 * tokens]
    policy.copy_(torch.arange(tokens)), reference.fill_(0.5)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    targets = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    sums = custom_op.sequence_sums(policy, targets, cu_seqlens, reference if per_token else None, backend)
    parts = [policy[first:last] for first, last in itertools.pairwise(bounds)]
    assert sums[1].tolist() == [float(part.sum()) for part in parts]
    assert sums[2].tolist() == [len(part) / 2 if per_token else 0 for part in parts]


@pytest.mark.parametrize("target", OUTSIDE)
def test_a_check_of_values_names_a_target_outside_the_vocabulary(target, backend, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("IRLFAST_CHECK", "1")
    case = with_targets(on_device(make(LENGTHS, vocabulary=VOCABULARY, size=8, dtype=torch.float32)), target)
    with pytest.raises(ValueError, match=f"targets: found {target}, expected 0 <= value < {VOCABULARY}"):
        ops.log_ratio(**case, backend=backend)


@pytest.mark.parametrize("row", [-1, sum(LENGTHS), 2**31, 2**32 + 1, -(2**63), 2**63 - 1])
def test_a_row_outside_hidden_is_never_read_and_its_token_is_nan(row):
    """In the fused forward of Triton: elsewhere, PyTorch selects the rows, and asserts on the device."""
    case = on_device(make(LENGTHS, vocabulary=VOCABULARY, size=8, dtype=torch.float32, rows=True, reference="hidden"))
    case["rows"][2] = row
    with torch.no_grad():
        assert ops.log_ratio(**case, backend="triton").token_logps.isnan().nonzero().tolist() == [[2]]
