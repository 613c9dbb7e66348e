"""Liger's class and ours, side by side: the same calls give the same results, gradients and refusals."""

import inspect

import pytest
import torch

from irlfast.integrations.liger import LOSSES, LigerFusedLinearDPOLoss
from tests.helpers.tiers import covering_cases, full, sweep

theirs = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
BOTH = (LigerFusedLinearDPOLoss, theirs)
OPTIONS = {
    "loss_type": LOSSES,
    "beta": [0.1, 0.3],
    "label_smoothing": [1e-3, 0.2],
    "discopop_tau": [0.05, 0.5],
    "average_log_prob": [False, True],
    "nll": [{}, {"compute_nll_loss": True, "alpha": 0.5}, {"compute_nll_loss": True}],
    "ignore_index": [-100, 42, -1],
    "use_ref_model": [True, False],
    "chunk_size": [1, 2],
    "biased": ["", "policy", "reference", "policy reference"],
    "layout": ["contiguous", "transposed", "every second"],
    "frozen": ["", "lin_weight", "bias", "_input"],
    "pairs": [1, 3],
}
V = 50


def tensors(case: dict) -> dict:
    """Arguments of forward, in fp32, with ``ignore_index`` in some places of each sequence."""
    torch.manual_seed(0)
    sequences, length = 2 * case["pairs"], 9
    target = torch.randint(V, (sequences, length))
    target[torch.rand(sequences, length) < 0.3] = case["ignore_index"]
    target[:, 0] = 7
    given = {
        "target": target,
        "lin_weight": torch.randn(V, 16),
        "_input": laid_out(case["layout"], sequences, length, 16),
    }
    if "policy" in case["biased"]:
        given["bias"] = torch.randn(V)
    if case["use_ref_model"]:
        given |= {"ref_input": torch.randn(sequences, length, 24), "ref_weight": torch.randn(V, 24)}
        given |= {"ref_bias": torch.randn(V)} if "reference" in case["biased"] else {}
    return given


def laid_out(layout: str, sequences: int, length: int, width: int) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(length, sequences, width).transpose(0, 1)
    if layout == "every second":
        return torch.randn(sequences, length, 2 * width)[..., ::2]
    return torch.randn(sequences, length, width)


def options_of(case: dict) -> dict:
    names = ("loss_type", "beta", "label_smoothing", "discopop_tau", "average_log_prob", "ignore_index")
    chosen = {name: case[name] for name in (*names, "use_ref_model", "chunk_size")}
    return chosen | case["nll"] | {"compiled": False}


def results(make, case: dict, *dtypes: torch.dtype) -> tuple[list, list]:
    """Loss and statistics, and gradients of twice the loss, of arguments that are cast to the dtypes in turn."""
    given = tensors(case)
    for dtype in dtypes:
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    names = [name for name in ("_input", "lin_weight", "bias") if name in given]
    leaves = {name: given[name].detach().requires_grad_(name != case["frozen"]) for name in names}
    loss, statistics = make(**options_of(case))(**given | leaves)
    (2 * loss).backward()
    return [loss.detach(), *statistics], [leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize("case", covering_cases(OPTIONS, beyond=full, drawn=60))
def test_the_same_loss_statistics_and_gradients(case):
    (values, gradients), (expected, expected_gradients) = (results(make, case) for make in BOTH)
    assert len(values) == len(expected) == 8
    for ours, liger in zip(values, expected, strict=True):
        torch.testing.assert_close(ours, liger.reshape(ours.shape), rtol=1e-4, atol=1e-5)
    for ours, liger in zip(gradients, expected_gradients, strict=True):
        assert (ours is None) == (liger is None)
        if ours is not None:
            assert (ours - liger).norm() <= 1e-4 * liger.norm() + 1e-6


PLAIN_CASE = {name: values[0] for name, values in OPTIONS.items()} | {"pairs": 3}


@sweep(loss_type=LOSSES, average_log_prob=[True, False])
def test_in_bf16_the_errors_are_no_larger_than_ligers(loss_type, average_log_prob):
    case = PLAIN_CASE | {"loss_type": loss_type, "average_log_prob": average_log_prob}
    (exact, *_), exact_gradients = results(LigerFusedLinearDPOLoss, case, torch.bfloat16, torch.float64)
    (ours, gradients), (liger, liger_gradients) = (results(make, case, torch.bfloat16) for make in BOTH)
    assert (ours[0] - exact).abs() <= (liger[0] - exact).abs() + 1e-5 * exact.abs() + 1e-5
    for mine, other, right in zip(gradients, liger_gradients, exact_gradients, strict=True):
        assert (mine - right).norm() <= 1.1 * (other - right).norm() + 4e-3 * right.norm()


@pytest.mark.parametrize("make", BOTH, ids=["ours", "liger's"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "Unsupported loss_type"),
        ({"loss_type": "no such loss"}, "Unsupported loss_type"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be > 0 for loss_type='exo_pair'"),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            r"label_smoothing must lie in \[0.0, 0.5\) for loss_type='robust'",
        ),
        (
            {"loss_type": "robust", "label_smoothing": -0.1},
            r"label_smoothing must lie in \[0.0, 0.5\) for loss_type='robust'",
        ),
    ],
    ids=str,
)
def test_what_liger_refuses_is_refused_by_the_same_words(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_the_arguments_are_ligers_with_ligers_defaults(method):
    ours, liger = (
        [(p.name, p.default) for p in inspect.signature(getattr(make, method)).parameters.values()] for make in BOTH
    )
    assert ours == liger


def test_every_option_can_be_read_back_as_from_ligers():
    options = options_of(PLAIN_CASE) | {"alpha": 0.5, "compute_nll_loss": True}
    ours, liger = (make(**options) for make in BOTH)
    assert all(getattr(ours, name) == getattr(liger, name) == value for name, value in options.items())


def test_without_a_gradient_the_loss_is_the_same():
    given = tensors(PLAIN_CASE)
    with torch.no_grad():
        ours, liger = (make(**options_of(PLAIN_CASE))(**given)[0] for make in BOTH)
    torch.testing.assert_close(ours, liger)


def test_an_answer_without_tokens_has_the_average_zero():
    given = tensors(PLAIN_CASE)
    given["target"][1] = PLAIN_CASE["ignore_index"]
    loss, (chosen, *_) = LigerFusedLinearDPOLoss(average_log_prob=True)(**given)
    assert chosen[1] == 0 and loss.isfinite()


def test_what_has_no_pairs_or_no_reference_is_refused_by_name():
    given = tensors(PLAIN_CASE)
    odd = given | {name: given[name][:5] for name in ("_input", "target", "ref_input")}
    with pytest.raises(ValueError, match="_input: found 5 sequences, expected chosen and as many rejected ones"):
        LigerFusedLinearDPOLoss()(**odd)
    with pytest.raises(ValueError, match="ref_input: found None"):
        LigerFusedLinearDPOLoss()(**given | {"ref_input": None})
    with pytest.raises(ValueError, match="ref_weight: found None"):
        LigerFusedLinearDPOLoss()(**given | {"ref_weight": None})
