"""Hidden reasoning on the exact test bed: every thought is enumerated, so that each objective is a sum."""

import functools
import itertools
import math
from array import array

import pytest
import torch

from irlfast.data.packing import PromptGroup, pack
from irlfast.data.store import Example
from irlfast.engine.module import Policy
from irlfast.losses.inputs import Normalisers
from irlfast.losses.reasoning import THOUGHT_REWARDS, reasoning_loss
from irlfast.methods.reasoning import answered
from tests.helpers.exact import END, PROMPTS, flat_gradient, model
from tests.helpers.prepared import prepared

MARK, LONGEST = 3, 2
PROMPT, EXPERT = PROMPTS[0], [1, 2, END]
# Every thought that sampling can give: ended by the mark or the end token, or cut at LONGEST tokens.
THOUGHTS = [[MARK], [END], *([word, last] for word in (1, 2) for last in range(4))]


@pytest.fixture(scope="module")
def policy():
    return model(2)


def group_of(thoughts: list[list[int]]) -> PromptGroup:
    example = Example(array("i", PROMPT), memoryview(array("i", EXPERT)))
    return answered(example, [array("i", thought) for thought in thoughts], MARK)


def loss_of(policy, reward: str, group: PromptGroup):
    loss = functools.partial(reasoning_loss, reward=reward, thoughts=len(group.answers))
    return Policy(prepared(policy), loss)(pack([group]), Normalisers(1, 1))


def logps(policy) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(z|x) and log π(y*|x,z) of every thought, from the logits of the model itself."""
    thoughts, answers = [], []
    for thought, whole in zip(THOUGHTS, group_of(THOUGHTS).answers, strict=True):
        ids = torch.tensor([[*PROMPT, *whole]])
        each = policy(ids).logits.log_softmax(-1)[0, len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None])[:, 0]
        thoughts.append(each[: len(thought)].sum())
        answers.append(each[len(thought) :].sum())
    return torch.stack(thoughts), torch.stack(answers)


def objective(reward: str, thought_logps: torch.Tensor, answer_logps: torch.Tensor, n: int) -> torch.Tensor:
    """The objective that ``reward`` names, by its definition: a sum over all n-tuples of thoughts."""
    tuples = torch.tensor(list(itertools.product(range(len(thought_logps)), repeat=n)))
    probability, each = thought_logps[tuples].sum(1).exp(), answer_logps[tuples]
    value = {
        "logprob": each.mean(1),
        "prob": each.exp().mean(1),
        "jensen": each.exp().mean(1).log(),
    }[reward]
    return probability @ value


def test_the_thoughts_are_all_that_sampling_can_give(policy):
    assert logps(policy)[0].exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("reward", THOUGHT_REWARDS)
def test_the_expected_gradient_is_that_of_the_objective_by_enumeration(policy, reward):
    """Over all pairs of thoughts that the policy can sample: of the thoughts and of the answer alike."""
    both = logps(policy)
    exact = -flat_gradient(objective(reward, *both, n=2), policy)
    assert exact.norm() > 0.01
    probability = both[0].detach().exp().tolist()
    total = torch.zeros_like(exact)
    for i, j in itertools.product(range(len(THOUGHTS)), repeat=2):
        loss, _ = loss_of(policy, reward, group_of([THOUGHTS[i], THOUGHTS[j]]))
        total += probability[i] * probability[j] * flat_gradient(loss, policy)
    torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("reward", THOUGHT_REWARDS)
def test_the_weights_are_unbiased_for_any_number_of_thoughts(reward, n):
    """Three thoughts with free log-probabilities; the objective's gradient by autograd, all n-tuples enumerated."""
    torch.manual_seed(n)
    logits, answers = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    thoughts = logits.log_softmax(0)
    exact = torch.autograd.grad(objective(reward, thoughts, answers, n), (logits, answers), retain_graph=True)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=n)))
    probability = thoughts[tuples].sum(1).exp().detach()
    advantages, weights = THOUGHT_REWARDS[reward](answers[tuples].detach())
    surrogate = probability @ (advantages * thoughts[tuples] + weights * answers[tuples]).sum(1)
    for estimated, true in zip(torch.autograd.grad(surrogate, (logits, answers)), exact, strict=True):
        torch.testing.assert_close(estimated, true)


def test_the_bounds_are_in_order_and_tighten_with_more_thoughts(policy):
    """E[log π(y*|z)] ≤ the bound of two thoughts ≤ that of three ≤ log E[π(y*|z)]."""
    both = [each.detach() for each in logps(policy)]
    single, two, three = objective("logprob", *both, 1), objective("jensen", *both, 2), objective("jensen", *both, 3)
    assert single < two - 0.01
    assert two < three < objective("prob", *both, 1).log()


def test_metrics_are_means_over_the_thoughts_of_a_prompt(policy):
    thought_logps, answer_logps = (each.detach() for each in logps(policy))
    chosen = [2, 5, 9]
    _, metrics = loss_of(policy, "logprob", group_of([THOUGHTS[i] for i in chosen]))
    expected = {
        "count": 1,
        "logps/chosen": answer_logps[chosen].mean().item(),
        "logps/chosen_tighter": answer_logps[chosen].logsumexp(0).item() - math.log(3),
        "logps/thought": thought_logps[chosen].mean().item(),
        "length/thought": 2,
        "length/chosen": (4 + 3 + 3) / 3,  # and the mark, which the first thought lacks
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, abs=1e-5)


def test_a_demonstration_with_a_thought_of_its_own_is_learned_from_its_answer_alone():
    example = Example(array("i", PROMPT), memoryview(array("i", [2, 2, MARK, *EXPERT])))
    group = answered(example, [array("i", [1, MARK]), array("i", [1, END])], MARK)
    assert [list(answer) for answer in group.answers] == [[1, MARK, *EXPERT], [1, END, MARK, *EXPERT]]
    assert group.thoughts == (2, 2)
