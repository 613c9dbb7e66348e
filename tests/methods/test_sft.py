"""The losses of SFT against closed forms on the exact test bed, and runs of them."""

import functools
import json

import pytest
import torch

from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example
from irlfast.losses.sft import sft_loss
from irlfast.methods.sft import group_of, with_reference
from irlfast.runs.run import Run
from tests.helpers.exact import ANSWERS, PROMPTS, flat_gradient, loss_of, model, scored
from tests.helpers.runs import contents, run, run_killed_at
from tests.helpers.tiers import first_then_full

GROUPS = [PromptGroup(prompt, (answer,)) for prompt in PROMPTS for answer in ANSWERS]
TOKENS = sum(len(group.answers[0]) for group in GROUPS)


def token_logps(policy) -> list[torch.Tensor]:
    """log π(y_t) of every enumerated answer, by the model's own logits."""
    logps = []
    for group in GROUPS:
        ids, answer = [*group.prompt, *group.answers[0]], torch.tensor(group.answers[0])
        rows = policy(torch.tensor([ids])).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
        logps.append(rows.gather(-1, answer[:, None])[:, 0])
    return logps


def loss_and_gradient(policy, groups=GROUPS, **options):
    loss, metrics = loss_of(policy, functools.partial(sft_loss, **options), groups)
    return loss, flat_gradient(loss, policy), metrics


@pytest.fixture(scope="module")
def bed():
    return model(1), model(2)  # reference, policy


def test_the_gradient_of_dft_is_that_of_the_mean_probability_of_the_experts_tokens(bed):
    _, policy = bed
    loss, gradient, metrics = loss_and_gradient(policy, loss_type="dft")
    logps = torch.cat(token_logps(policy))
    torch.testing.assert_close(loss, -(logps.exp() * logps).sum() / TOKENS)
    torch.testing.assert_close(gradient, flat_gradient(-logps.exp().sum() / TOKENS, policy))
    assert gradient.norm() > 0.01
    assert metrics["weight"].item() / len(GROUPS) == pytest.approx(logps.exp().mean().item())
    assert metrics["nll_loss"].item() / len(GROUPS) == pytest.approx(-logps.mean().item())


def test_iw_sft_weighs_each_demonstration_by_the_geometric_mean_of_its_ratios_up_to_16(bed):
    reference, policy = bed
    groups = scored(reference, GROUPS)
    ratios = [y - y_ref for y, y_ref in zip(token_logps(policy), token_logps(reference), strict=True)]
    # A demonstration whose tokens the reference finds e⁴ times less likely still reaches the limit.
    groups[3] = groups[3]._replace(ref_logps=(groups[3].ref_logps[0] - 4,))
    ratios[3] = ratios[3] + 4
    weights = [min(ratio.mean().exp().item(), 16.0) for ratio in ratios]
    assert weights[3] == 16 and len({round(weight, 6) for weight in weights}) > len(GROUPS) // 2
    loss, gradient, _ = loss_and_gradient(policy, groups, loss_type="iw_sft")
    expected = -sum(w * y.sum() for w, y in zip(weights, token_logps(policy), strict=True)) / TOKENS
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, flat_gradient(expected, policy))


def test_iw_sft_at_the_reference_is_sft(bed):
    _, policy = bed
    loss, gradient, metrics = loss_and_gradient(policy, scored(policy, GROUPS), loss_type="iw_sft")
    sft, sft_gradient, _ = loss_and_gradient(policy)
    torch.testing.assert_close(loss, sft)
    torch.testing.assert_close(gradient, sft_gradient)
    assert metrics["weight"].item() == pytest.approx(len(GROUPS))


def test_remaining_weighs_each_token_by_the_share_that_is_left(bed):
    _, policy = bed
    loss, gradient, _ = loss_and_gradient(policy, loss_type="dft", remaining=True)
    shares = [torch.arange(len(y), 0, -1) / len(y) for y in token_logps(policy)]
    expected = -sum((share * y.detach().exp() * y).sum() for share, y in zip(shares, token_logps(policy), strict=True))
    torch.testing.assert_close(loss, expected / TOKENS)
    torch.testing.assert_close(gradient, flat_gradient(expected / TOKENS, policy))


def test_the_reference_scores_the_tokens_that_are_learned_and_no_others(tmp_path, monkeypatch):
    group = group_of(Example([1, 2, 3, 1, 2], [3, 0], earlier=[2, 3]))
    assert group.answers[0].tolist() == [3, 1, 2, 3, 0] and group.learned == [0, 1, 3, 4]
    monkeypatch.setattr("irlfast.methods.sft.score", lambda *_, **__: [(-torch.arange(5.0),)])
    config = make_config({"dataset_name": __file__, "model_name_or_path": "."})
    given = Run(config, tmp_path, "initial", None, [], [], None, None)
    [scored_group] = with_reference(given, "initial", [group], tmp_path / "reference.safetensors")
    assert scored_group.ref_logps[0].tolist() == [0, -1, -3, -4]


MOMENTS = ("sft-nll/checkpoint", "sft-nll/eval.json", "sft/checkpoint")


@pytest.mark.parametrize("loss_type", first_then_full(["iw_sft", "dft"]))
def test_a_killed_run_ends_with_the_same_bytes_and_logs_the_likelihood_beside_the_loss(tmp_path, loss_type):
    keys = {"method": "sft", "inner_steps": "null", "sft_nll_steps": 4, "sft_loss_type": loss_type}
    run(tmp_path / "whole", **keys)
    run_killed_at(tmp_path / "killed", MOMENTS, **keys)
    run(tmp_path / "killed", **keys)
    assert contents(tmp_path / "killed" / "final") == contents(tmp_path / "whole" / "final")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [
        *(("sft-nll", step) for step in (2, 4)),
        *(("sft", step) for step in (2, 4, 6)),
    ]
    assert all(row["loss"] == row["nll_loss"] for row in rows if row["phase"] == "sft-nll")
    assert rows[-1]["loss"] != rows[-1]["nll_loss"]
