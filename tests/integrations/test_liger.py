"""Liger's class and ours, side by side: the same call gives the same results and gradients."""

import pytest
import torch

from irlfast.integrations.liger import LigerFusedLinearDPOLoss

theirs = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
FIGURES = (
    "chosen logps",
    "rejected logps",
    "chosen logits",
    "rejected logits",
    "nll",
    "chosen reward",
    "rejected reward",
)


def arguments(reference: bool, bias: bool) -> dict:
    torch.manual_seed(0)
    target = torch.randint(50, (6, 9))
    target[torch.rand(6, 9) < 0.3] = -1
    given = {
        "lin_weight": torch.randn(50, 16).requires_grad_(),
        "_input": torch.randn(6, 9, 16).requires_grad_(),
        "target": target,
        "bias": torch.randn(50).requires_grad_() if bias else None,
    }
    if reference:
        given |= {"ref_input": torch.randn(6, 9, 24), "ref_weight": torch.randn(50, 24)}
        given |= {"ref_bias": torch.randn(50) if bias else None}
    return given


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize(
    "options", [{"beta": 0.3}, {"loss_type": "hinge"}, {"compute_nll_loss": True, "alpha": 0.5}], ids=str
)
def test_same_loss_figures_and_gradients(options, reference, bias):
    options = options | {"ignore_index": -1, "use_ref_model": reference}
    results = []
    for make in (LigerFusedLinearDPOLoss, theirs):
        given = arguments(reference, bias)
        loss, metrics = make(**options, compiled=False)(**given)
        (2 * loss).backward()
        leaves = [given[name].grad for name in ("lin_weight", "_input", "bias") if given[name] is not None]
        results.append([loss.detach(), *metrics, *leaves])
    assert len(results[0]) == len(results[1]) == 1 + len(FIGURES) + 2 + bias
    for ours, liger in zip(*results, strict=True):
        torch.testing.assert_close(ours, liger.reshape(ours.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", [{"loss_type": "ipo"}, {"average_log_prob": True}, {"label_smoothing": 0.1}])
def test_what_is_missing_is_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        LigerFusedLinearDPOLoss(**option)
