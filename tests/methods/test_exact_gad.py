"""GAD and GRPO against closed forms, on the exact test bed: what group advantages raise, and where GAD ends."""

from types import SimpleNamespace

import pytest
import torch

from irlfast.methods.credit import advantages_of
from tests.helpers.exact import ANSWERS, answer_logps, flat_gradient, model
from tests.helpers.tiers import first_then_full
from tests.methods.test_exact_rft import PROMPT, aligned_loss, groups_of, kl_at, learned, rewards_at

GRPO = SimpleNamespace(align="grpo", whiten_rewards=False, reward_credit="sequence", gamma=1.0)
LENGTHS = torch.tensor([len(answer) for answer in ANSWERS], dtype=torch.float64)


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """GRPO's advantages of answers of one token, ``[P, n]``."""
    return torch.tensor(
        [[a.item() for a in each] for each in advantages_of([tuple(r.split(1)) for r in rewards], GRPO)]
    )


def test_group_advantages_have_mean_0_and_standard_deviation_1_whatever_the_rewards_scale():
    rewards = torch.randn(5, 6, dtype=torch.float64) * torch.logspace(0, 3, 5, dtype=torch.float64)[:, None]
    rewards[2] = 7.0  # a group whose answers are all as good
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(advantages.std(1), torch.tensor([1.0, 1, 0, 1, 1]), rtol=0, atol=1e-3)


def test_grpo_of_two_answers_raises_by_enumeration_the_share_of_answers_that_are_beaten():
    """With n = 2 the advantages are ±1/√2: the expected gradient is −(1/√2) Σ π(y)·∇log π(y)/|y|·(beaten − better).

    "Beaten" is the probability that another answer has a lower reward, and "better" that it has a higher one.
    """
    policy, reward = model(2), 1e3 * rewards_at(0)  # TRL's 1e-4 beside the standard deviation is nothing then
    logq = answer_logps(policy, PROMPT)
    q = logq.detach().exp()
    wins = (reward[:, None] - reward[None, :]).sign() @ q
    exact = -flat_gradient((q * wins / LENGTHS * logq).sum() / 2**0.5, policy)
    chosen = [(i, j) for i in range(len(ANSWERS)) for j in range(len(ANSWERS))]
    groups = groups_of(policy, policy, chosen, reward, "grpo", "none")
    weights = len(groups) * torch.outer(q, q).flatten()  # at the policy that sampled, the loss is linear in advantages
    weighted = [x._replace(advantages=tuple(w * a for a in x.advantages)) for x, w in zip(groups, weights, strict=True)]
    assert exact.norm() > 0.01
    total = flat_gradient(aligned_loss(policy, weighted, "grpo", "none"), policy)
    torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-7)


def test_the_policy_of_gad_stands_still_at_the_expert():
    """No reward tells the two apart there: its Bradley-Terry optimum is constant, and its group advantages are 0."""
    expert = answer_logps(model(1), PROMPT).detach()[:5].softmax(0)
    reward = learned("bradley_terry", expert, expert)
    assert group_advantages(reward[None]).abs().max() < 1e-6
    other = answer_logps(model(2), PROMPT).detach()[:5].softmax(0)
    assert group_advantages(learned("bradley_terry", expert, other)[None]).abs().max() > 1


@pytest.mark.parametrize("align", first_then_full(["grpo", "rloo"], others=0))
def test_gad_reaches_the_expert_by_alternating(align):
    """In each round the reward is the Bradley-Terry optimum log π_E/π, and the policy takes one step on it."""
    expert, policy = model(1), model(2)
    before = kl_at(expert, policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    torch.manual_seed(0)
    rounds = 250
    for number in range(rounds):
        old = answer_logps(policy, PROMPT).detach()
        reward = answer_logps(expert, PROMPT).detach() - old
        drawn = torch.multinomial(old.exp(), 16 * 8, replacement=True).view(-1, 8).tolist()
        groups = groups_of(policy, policy, [tuple(group) for group in drawn], reward, align, "none")
        for settings in optimizer.param_groups:
            settings["lr"] = 1e-2 * (1 - number / rounds)
        optimizer.zero_grad()
        aligned_loss(policy, groups, align, "none").backward()
        optimizer.step()
    assert before > 1
    assert kl_at(expert, policy) < 0.05
