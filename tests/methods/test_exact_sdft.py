"""Self-distillation on the exact test bed: losses against autograd, expectations of gradients, the fixed point."""

import functools

import pytest
import torch

from irlfast.data.packing import PromptGroup, pack
from irlfast.engine.module import Policy
from irlfast.engine.teacher import TeacherModel
from irlfast.losses.distillation import distillation_loss
from irlfast.losses.inputs import Normalisers
from tests.helpers.exact import ANSWERS, PROMPTS, answer_logps, flat_gradient, kl, model
from tests.helpers.prepared import prepared
from tests.helpers.tiers import first_then_full

STEPS = 150  # to the fixed point
SHOWN = [2, 3, 1]  # the teacher's prompt
WAYS = {
    "forward": {"mode": "full_logits", "alpha": 0.0},
    "reverse": {"mode": "full_logits", "alpha": 1.0},
    "Jensen-Shannon": {"mode": "full_logits", "alpha": 0.3},
    "top 2": {"mode": "topk_logits", "alpha": 1.0, "top_k": 2},
    "top 2 and tail": {"mode": "topk_logits", "alpha": 0.0, "top_k": 2, "add_tail": True},
    "sampled": {"mode": "sampled_token", "alpha": 1.0},
}


def policy_with(policy, teacher, **options) -> Policy:
    loss = functools.partial(distillation_loss, **{"top_k": 1, **options})
    return Policy(prepared(policy), loss, teacher=TeacherModel(prepared(teacher), {}))


def loss_of(policy, teacher, groups, **options) -> torch.Tensor:
    """The trainer's own loss: what its engine calls."""
    return policy_with(policy, teacher, **options)(pack(groups), Normalisers(len(groups), 1.0))[0]


def next_logps(policy, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log π(· | prompt, answer before t) for every token t of an answer: ``[T, V]``."""
    logits = policy(torch.tensor([[*prompt, *answer]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def by_autograd(policy, teacher, prompt, shown, answer, mode, alpha, top_k=None, add_tail=False) -> torch.Tensor:
    """The mean over an answer's tokens of the divergence, written out."""
    q = next_logps(policy, prompt, answer)
    r = next_logps(teacher, shown, answer).detach()
    if mode == "sampled_token":
        rows = torch.arange(len(answer))
        q, r = q[rows, answer], r[rows, answer]
        return ((q - r).detach() * q).mean()
    if mode == "topk_logits":
        top = q.topk(top_k).indices
        others = torch.ones_like(q, dtype=torch.bool).scatter(1, top, False)
        tails = [x[others].view(len(x), -1).logsumexp(1, keepdim=True) for x in (q, r)]
        q, r = (x.gather(1, top) for x in (q, r))
        q, r = (
            torch.cat([x, tail], 1) if add_tail else x.log_softmax(1) for x, tail in zip((q, r), tails, strict=True)
        )
    m = torch.log(alpha * r.exp() + (1 - alpha) * q.exp())
    towards_teacher, towards_policy = ((p.exp() * (p - m)).sum(1) for p in (r, q))
    if alpha in (0, 1):
        return (towards_teacher if alpha == 0 else towards_policy).mean()
    return (alpha * towards_teacher + (1 - alpha) * towards_policy).mean()


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_and_its_gradient_are_those_of_autograd_on_written_out_distributions(way):
    policy, teacher = model(1), model(2)
    groups = [PromptGroup(PROMPTS[0], (answer,), teacher_prompt=SHOWN) for answer in ANSWERS]
    loss = loss_of(policy, teacher, groups, **WAYS[way])
    each = [by_autograd(policy, teacher, PROMPTS[0], SHOWN, answer, **WAYS[way]) for answer in ANSWERS]
    expected = sum(each) / len(each)
    assert abs(expected.item()) > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    gradient = flat_gradient(expected, policy)
    assert gradient.norm() > 0.01
    torch.testing.assert_close(flat_gradient(loss, policy), gradient, rtol=1e-8, atol=1e-8)


def expected_gradient(policy, teacher, weigh_by_length: bool, **options) -> torch.Tensor:
    """E_{y ~ π} ∇loss(y), by enumeration. By its length, the loss is a sum over an answer's tokens, not their mean."""
    probabilities = answer_logps(policy, PROMPTS[0]).detach().exp()
    total = 0
    for probability, answer in zip(probabilities, ANSWERS, strict=True):
        group = PromptGroup(PROMPTS[0], (answer,), teacher_prompt=SHOWN)
        gradient = flat_gradient(loss_of(policy, teacher, [group], **options), policy)
        total = total + probability * gradient * (len(answer) if weigh_by_length else 1)
    return total


def test_the_sampled_tokens_gradient_is_unbiased_for_the_reverse_kl_of_the_tokens_that_the_policy_visits():
    """Both are sums over an answer's tokens. The mean is biased, because its length depends on the tokens."""
    policy, teacher = model(1), model(2)
    sampled, full = WAYS["sampled"], WAYS["reverse"]
    exact = expected_gradient(policy, teacher, True, **full)
    assert exact.norm() > 0.1
    torch.testing.assert_close(expected_gradient(policy, teacher, True, **sampled), exact, rtol=1e-9, atol=1e-9)
    mean, biased = (expected_gradient(policy, teacher, False, **way) for way in (full, sampled))
    assert (biased - mean).norm() > 0.01 * mean.norm()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_to_learn_from_a_teacher_that_the_policy_equals(way):
    policy = model(1)
    groups = [PromptGroup(PROMPTS[0], (answer,), teacher_prompt=PROMPTS[0]) for answer in ANSWERS]
    loss = loss_of(policy, policy, groups, **WAYS[way])
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert flat_gradient(loss, policy).norm().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("way", first_then_full(["reverse", "forward", "Jensen-Shannon", "sampled"], others=1))
def test_the_policy_becomes_a_teacher_that_is_the_expert(way):
    """With T = π_E(· | x) the expert is the fixed point: KL(π_E ‖ π) falls from nats to hundredths on-policy."""
    expert, policy = model(2), model(1)
    assert kl(expert, policy) > 1
    trained = policy_with(policy, expert, **WAYS[way])
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=STEPS)
    torch.manual_seed(0)
    for _ in range(STEPS):
        groups = []
        for prompt in PROMPTS:
            drawn = answer_logps(policy, prompt).detach().exp().multinomial(24, replacement=True)
            groups += [PromptGroup(prompt, (ANSWERS[i],)) for i in drawn.tolist()]
        optimizer.zero_grad()
        trained(pack(groups), Normalisers(len(groups), 1.0))[0].backward()
        optimizer.step()
        schedule.step()
    assert kl(expert, policy) < 0.03


def test_an_importance_weight_is_the_ratio_to_the_policy_that_sampled_up_to_the_clip():
    policy, teacher, older = model(1), model(2), model(3)
    answer = ANSWERS[-1]
    rows = torch.arange(len(answer))
    old = next_logps(older, PROMPTS[0], answer)[rows, answer].detach()
    ratio = (next_logps(policy, PROMPTS[0], answer)[rows, answer].detach() - old).exp()
    clip = ratio.sort().values[:2].mean().item()  # between the weights, so that some are clipped
    group = PromptGroup(PROMPTS[0], (answer,), teacher_prompt=SHOWN, old_logps=(old.float(),))
    loss = loss_of(policy, teacher, [group], is_clip=clip, **WAYS["reverse"])
    q, r = next_logps(policy, PROMPTS[0], answer), next_logps(teacher, SHOWN, answer)
    expected = ((q.exp() * (q - r)).sum(1) * ratio.clamp(max=clip)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_a_temperature_divides_the_logits_of_both():
    policy, teacher, answer, temperature = model(1), model(2), ANSWERS[-1], 1.7
    group = PromptGroup(PROMPTS[0], (answer,), teacher_prompt=SHOWN)
    for way in ("reverse", "sampled"):
        loss = loss_of(policy, teacher, [group], temperature=temperature, **WAYS[way])
        hot = [model(1), model(2)]
        with torch.no_grad():
            for each in hot:
                each.transformer.ln_f.weight /= temperature
                each.transformer.ln_f.bias /= temperature
        expected = loss_of(*hot, [group], **WAYS[way])
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def test_a_batch_that_scores_nothing_has_no_loss_and_no_gradient():
    policy, teacher = model(1), model(2)
    batch = pack([PromptGroup(PROMPTS[0], (ANSWERS[0],), teacher_prompt=SHOWN)]).unscored()
    for way in ("reverse", "top 2", "sampled"):
        loss, metrics = policy_with(policy, teacher, **WAYS[way])(batch, Normalisers(1, 1))
        assert loss.item() == metrics["count"].item() == 0
        assert flat_gradient(loss, policy).norm() == 0
