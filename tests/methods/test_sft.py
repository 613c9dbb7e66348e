"""The losses of SFT against closed forms on the exact test bed, and runs of them."""

import functools
import json

import pytest
import torch

from irlfast.config import make_config
from irlfast.data.packing import PromptGroup, pack
from irlfast.data.store import Example
from irlfast.engine.teacher import TeacherModel
from irlfast.losses.inputs import Normalisers, Teacher
from irlfast.losses.sft import sft_loss
from irlfast.methods.sft import group_of, with_reference
from irlfast.ops import Head
from irlfast.runs.run import Run
from tests.helpers.exact import ANSWERS, PROMPTS, flat_gradient, loss_of, model, scored
from tests.helpers.prepared import prepared
from tests.helpers.runs import contents, run, run_killed_at
from tests.helpers.tiers import first_then_full

GROUPS = [PromptGroup(prompt, (answer,)) for prompt in PROMPTS for answer in ANSWERS]
TOKENS = sum(len(group.answers[0]) for group in GROUPS)


def rows_of(policy) -> list[torch.Tensor]:
    """Log-probabilities of all tokens at every step of every enumerated answer, by the model's own logits."""
    ids = [torch.tensor([[*group.prompt, *group.answers[0]]]) for group in GROUPS]
    logits = [policy(each).logits[0, len(group.prompt) - 1 : -1] for each, group in zip(ids, GROUPS, strict=True)]
    return [each.log_softmax(-1) for each in logits]


def token_logps(policy) -> list[torch.Tensor]:
    """log π(y_t) of every enumerated answer."""
    answers = [torch.tensor(group.answers[0])[:, None] for group in GROUPS]
    return [rows.gather(-1, answer)[:, 0] for rows, answer in zip(rows_of(policy), answers, strict=True)]


def loss_and_gradient(policy, groups=GROUPS, teacher=None, **options):
    taught_by = teacher and TeacherModel(prepared(teacher), {})
    loss, metrics = loss_of(policy, functools.partial(sft_loss, **options), groups, taught_by)
    return loss, flat_gradient(loss, policy), metrics


@pytest.fixture(scope="module")
def bed():
    return model(1), model(2)  # reference or teacher, policy


def test_the_gradient_of_dft_is_that_of_the_mean_probability_of_the_experts_tokens(bed):
    _, policy = bed
    loss, gradient, metrics = loss_and_gradient(policy, loss_type="dft")
    logps = torch.cat(token_logps(policy))
    torch.testing.assert_close(loss, -(logps.exp() * logps).sum() / TOKENS)
    torch.testing.assert_close(gradient, flat_gradient(-logps.exp().sum() / TOKENS, policy))
    assert gradient.norm() > 0.01
    assert metrics["weight"].item() / len(GROUPS) == pytest.approx(logps.exp().mean().item())
    assert metrics["nll_loss"].item() / len(GROUPS) == pytest.approx(-logps.mean().item())


def test_psft_at_the_old_policy_has_sfts_gradient(bed):
    _, policy = bed
    loss, gradient, metrics = loss_and_gradient(policy, teacher=policy, loss_type="psft")
    assert loss.item() == pytest.approx(-1, abs=1e-12) and metrics["clip_ratio"] == 0
    torch.testing.assert_close(gradient, loss_and_gradient(policy)[1])


def test_psft_is_the_mean_ratio_up_to_the_limit_and_tokens_beyond_have_no_gradient(bed):
    old, policy = bed
    loss, gradient, metrics = loss_and_gradient(policy, teacher=old, loss_type="psft", clip_range=0.28)
    ratios = (torch.cat(token_logps(policy)) - torch.cat(token_logps(old)).detach()).exp()
    expected = -ratios.clamp(max=1.28).sum() / TOKENS
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, flat_gradient(expected, policy))
    beyond = ratios > 1.28
    assert metrics["clip_ratio"].item() / len(GROUPS) == pytest.approx(beyond.double().mean().item())
    ended = [group for group in GROUPS if len(group.answers[0]) == 1]  # one token each, an answer per prompt
    ended_beyond = [beyond[sum(len(x.answers[0]) for x in GROUPS[: GROUPS.index(group)])].item() for group in ended]
    gradients = [loss_and_gradient(policy, [group], old, loss_type="psft", clip_range=0.28)[1] for group in ended]
    assert [not each.any() for each in gradients] == ended_beyond


def test_asft_is_dft_plus_the_reverse_kl_over_the_vocabulary(bed):
    reference, policy = bed
    loss, gradient, metrics = loss_and_gradient(policy, teacher=reference, loss_type="asft", kl_weight=0.3)
    both = [torch.cat(rows_of(each)) for each in (policy, reference)]
    divergence = (both[0].exp() * (both[0] - both[1].detach())).sum() / TOKENS
    dft, dft_gradient, _ = loss_and_gradient(policy, loss_type="dft")
    torch.testing.assert_close(loss, dft + 0.3 * divergence)
    torch.testing.assert_close(gradient, dft_gradient + 0.3 * flat_gradient(divergence, policy))
    assert metrics["kl_per_token"].item() / len(GROUPS) == pytest.approx(divergence.item())


@pytest.mark.parametrize(("weight", "at_the_reference"), [(0.0, False), (0.3, True)])
def test_asft_without_weight_and_at_the_reference_has_dfts_gradient(bed, weight, at_the_reference):
    reference, policy = bed
    teacher = policy if at_the_reference else reference
    loss, gradient, _ = loss_and_gradient(policy, teacher=teacher, loss_type="asft", kl_weight=weight)
    dft, dft_gradient, _ = loss_and_gradient(policy, loss_type="dft")
    torch.testing.assert_close(loss, dft)
    torch.testing.assert_close(gradient, dft_gradient)


def test_asfts_fixed_point_is_the_reference_times_the_exponential_of_the_experts_share():
    """−Σ_v e_v ∇π_v + λ ∇KL(π ‖ π_ref) = 0 at π ∝ π_ref·exp(e/λ), where e are the shares of the expert's tokens."""
    experts, weight = [0, 0, 0, 2], 0.5
    shares, reference = torch.tensor([0.75, 0, 0.25, 0]).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    batch = pack([PromptGroup([1], ([token],)) for token in experts])
    hidden = torch.ones(len(experts), 1).double()
    teacher = Teacher(hidden, Head(reference.log()[:, None], None, 1.0, None), batch.rows)
    norms = []
    for scale in (1.0, 0.9):
        logits = (reference.log() + scale * shares / weight)[:, None].requires_grad_()
        head = Head(logits, None, 1.0, None)
        options = {"loss_type": "asft", "kl_weight": weight, "teacher": teacher}
        sft_loss(hidden, head, batch, Normalisers(4, 4), **options)[0].backward()
        norms.append(logits.grad.norm().item())
    assert norms[0] < 1e-12 and norms[1] > 1e-3


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


@pytest.mark.parametrize("loss_type", first_then_full(["psft", "iw_sft", "dft", "asft"], others=1))
def test_a_killed_run_ends_with_the_same_bytes_and_logs_the_likelihood_beside_the_loss(tmp_path, loss_type):
    keys = {"method": "sft", "inner_steps": "null", "sft_nll_steps": 4, "sft_loss_type": loss_type}
    if loss_type == "psft":
        keys["ref_model_sync_steps"] = 4  # after the last checkpoint but one, so that a resumed run continues from it
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
