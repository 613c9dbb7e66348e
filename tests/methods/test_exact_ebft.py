"""EBFT (arXiv 2603.12248) against its definition, on the exact test bed: features, reward, gradient, fixed point."""

import functools
from types import SimpleNamespace

import pytest
import torch

from irlfast.data.packing import PromptGroup, pack
from irlfast.engine.module import Policy
from irlfast.losses.inputs import Normalisers
from irlfast.losses.policy import align_loss
from irlfast.methods.credit import advantages_of
from irlfast.models.forward import states_at
from irlfast.ops import lm_head
from irlfast.sampling.features import features, matching_reward, whitened
from tests.helpers.exact import ANSWERS, END, PROMPTS, answer_logps, flat_gradient, model
from tests.helpers.prepared import prepared

PROMPT = PROMPTS[0]
DEPTHS = (0.0, 1.0)


@pytest.fixture(scope="module")
def bed():
    """A policy, another model that is frozen, and the frozen model's features of every answer."""
    frozen = model(3)
    batch = pack([PromptGroup(PROMPT, tuple([*answer, END] for answer in ANSWERS))])
    with torch.no_grad():
        each = features(states_at(frozen, batch, DEPTHS), lm_head(frozen), batch)
    return model(2), frozen, torch.cat(list(each)).double()


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """The trainer's advantages ``[B, n]`` of whole answers, from their rewards."""
    config = SimpleNamespace(align="rloo", whiten_rewards=False, reward_credit="sequence", gamma=1.0)
    each = advantages_of([row.split(1) for row in rewards], config)
    return torch.cat([a for answers in each for a in answers]).view_as(rewards).double()


def expected_gradient(policy, phi: torch.Tensor, expert: int, diversity: float = 1.0) -> torch.Tensor:
    """The expectation of the trainer's gradient over all triples of answers that the policy can sample."""
    q = answer_logps(policy, PROMPT).detach().exp()
    count = len(ANSWERS)
    triples = torch.combinations(torch.arange(count), 3, with_replacement=True)
    orders = torch.tensor([6, 3, 1])[(triples.diff(dim=1) == 0).sum(1)]  # in which the triple can be sampled
    reward = torch.vmap(lambda samples: matching_reward(samples, phi[expert], False, diversity))(phi[triples])
    weighted = advantages(reward) * (orders * q[triples].prod(1))[:, None]  # [triples, 3]
    total = torch.zeros(count, dtype=torch.float64).index_add(0, triples.flatten(), weighted.flatten()) / 3
    # The loss is linear in the advantages, so that one group of all answers has the sum over all triples.
    each = tuple(a.expand(len(answer)) for a, answer in zip((count * total).float(), ANSWERS, strict=True))
    group = PromptGroup(PROMPT, tuple(ANSWERS), old_logps=each, advantages=each)
    options = {"align": "rloo", "answers": count, "beta": 1.0, "kl_in_loss": False, "clip_range": 0.2}
    loss, _ = Policy(prepared(policy), functools.partial(align_loss, **options))(pack([group]), Normalisers(1, 1))
    return flat_gradient(loss, policy)


def matching_loss(policy, phi: torch.Tensor, expert: int) -> torch.Tensor:
    """‖E_π[φ(ỹ)] − φ(y)‖²."""
    return (answer_logps(policy, PROMPT).exp() @ phi - phi[expert]).square().sum()


def test_the_expected_gradient_is_that_of_the_feature_matching_loss_by_enumeration(bed):
    policy, _, phi = bed
    exact = flat_gradient(matching_loss(policy, phi, 7), policy)
    assert exact.norm() > 0.1
    torch.testing.assert_close(expected_gradient(policy, phi, 7), exact, rtol=1e-5, atol=1e-6)


def test_with_the_papers_divisor_and_the_plain_baseline_the_gradient_would_be_biased(bed):
    """The factor (n − 1)/(n − 2) of the reward is needed: without it, n = 3 would halve the price of similarity."""
    policy, _, phi = bed
    exact = flat_gradient(matching_loss(policy, phi, 7), policy)
    without = expected_gradient(policy, phi, 7, diversity=0.5)
    assert (without - exact).norm() > 0.05 * exact.norm()


def test_the_gradient_is_zero_where_the_moments_match():
    """A policy over 6 answers, all enumerated; demonstrations drawn from the policy itself have its moments."""
    phi = torch.nn.functional.normalize(torch.randn(6, 3, dtype=torch.float64), dim=1)
    triples = torch.cartesian_prod(*[torch.arange(6)] * 3)

    def gradient(policy: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """Σ_y π_E(y)·E[Σ_j A_j·∇log π(ỹ_j)], with respect to the logits of the policy."""
        logits = policy.log().requires_grad_()
        weight = policy[triples].prod(1, keepdim=True)
        total = torch.zeros((), dtype=torch.float64)
        for y, share in enumerate(expert.tolist()):
            reward = torch.vmap(lambda samples, y=y: matching_reward(samples, phi[y], False, 1.0))(phi[triples])
            total = total + share * (weight * advantages(reward) * logits.log_softmax(0)[triples]).sum()
        return torch.autograd.grad(total, logits)[0]

    policy, other = torch.randn(2, 6, dtype=torch.float64).softmax(1)
    assert gradient(policy, policy).norm() < 1e-6
    assert gradient(policy, other).norm() > 0.01


@pytest.mark.parametrize("n", [3, 4, 6])
def test_advantages_are_those_of_the_authors_code(n):
    """Alignment less its leave-one-out mean; diversity less the mean over pairs of the other answers."""
    phi = torch.nn.functional.normalize(torch.randn(n + 1, 5, dtype=torch.float64), dim=1)
    samples, expert = phi[:n], phi[n]
    alignment = 2 * samples @ expert
    similarity = (samples @ samples.T).fill_diagonal_(0)
    diversity = 2 * similarity.sum(1) / (n - 1)
    alignment = alignment - (alignment.sum() - alignment) / (n - 1)
    diversity = diversity - (diversity.sum() - 2 * diversity) / (n - 2)
    reward = matching_reward(samples, expert, False, 0.7)
    torch.testing.assert_close(advantages(reward[None])[0], alignment - 0.7 * diversity, rtol=1e-5, atol=1e-6)


def test_features_are_the_frozen_models_states_above_the_whole_answer(bed):
    _, frozen, phi = bed
    for i in (0, 5, len(ANSWERS) - 1):
        with torch.no_grad():
            states = frozen(torch.tensor([[*PROMPT, *ANSWERS[i]]]), output_hidden_states=True).hidden_states
        expected = torch.cat([torch.nn.functional.normalize(states[at][0, -1], dim=0) for at in (0, -1)])
        torch.testing.assert_close(phi[i], expected / 2**0.5, rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in phi.round(decimals=6).tolist()}) == len(ANSWERS)


def test_whitened_samples_are_orthonormal_and_the_expert_is_mapped_alike():
    phi = torch.randn(4, 9, dtype=torch.float64)
    samples, expert = whitened(phi[:3], phi[1])
    torch.testing.assert_close(samples @ samples.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(expert, samples[1])
    reward = matching_reward(phi[:3], phi[1], True, 1.0)
    torch.testing.assert_close(reward, torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64))


def test_whitened_samples_that_repeat_pay_for_their_similarity():
    phi = torch.randn(3, 9, dtype=torch.float64)
    repeated = phi[[0, 0, 1, 2]]
    samples, _ = whitened(repeated, phi[1])
    torch.testing.assert_close(samples.square().sum(1), torch.tensor([0.5, 0.5, 1, 1], dtype=torch.float64))
    reward = matching_reward(repeated, phi[1], True, 1.0)
    torch.testing.assert_close(reward, torch.tensor([-0.5, -0.5, 2.0, 0.0], dtype=torch.float64))
