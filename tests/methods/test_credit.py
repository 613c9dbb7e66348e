"""Credit per token: advantages from rewards-to-go, on the exact test bed and in a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from irlfast import ops
from irlfast.data.packing import PromptGroup, pack
from irlfast.losses.inputs import arguments
from irlfast.losses.policy import SampledAnswers, ppo, rloo
from irlfast.methods.credit import advantages_of, less_kl, less_penalties, totals
from irlfast.models.forward import hidden_states
from tests.helpers.exact import ANSWERS, PROMPTS, answer_logps, flat_gradient, model
from tests.helpers.runs import contents, run, run_killed_at
from tests.helpers.tiers import full, one_run_or_each_its_own

BETA = 0.7
PROMPT = PROMPTS[0]
LENGTHS = [len(answer) for answer in ANSWERS]
ENDS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
PAIRS = [(i, j) for i in range(len(ANSWERS)) for j in range(len(ANSWERS))]


def config(credit: str = "token", gamma: float = 1.0, **keys) -> SimpleNamespace:
    return SimpleNamespace(**{"align": "rloo", "whiten_rewards": False} | keys, reward_credit=credit, gamma=gamma)


@pytest.fixture(scope="module")
def bed():
    return model(1), model(2)  # reference, policy


@pytest.fixture(scope="module")
def rewards():
    """An arbitrary reward of every token after every prefix, for each answer."""
    generator, known = torch.Generator().manual_seed(0), {}
    for answer in ANSWERS:
        for t in range(len(answer)):
            known.setdefault(tuple(answer[: t + 1]), torch.randn((), generator=generator, dtype=torch.float64))
    return [torch.stack([known[tuple(answer[: t + 1])] for t in range(len(answer))]) for answer in ANSWERS]


def token_logps(policy) -> torch.Tensor:
    """log π(y_t) of every token of every answer, ``[N]``, differentiable, by the plain oracle."""
    batch = pack([PromptGroup(PROMPT, (answer,)) for answer in ANSWERS])
    hidden = hidden_states(policy, batch)
    return ops.log_ratio(hidden, **arguments(ops.lm_head(policy), batch), backend="plain").token_logps


def by_answer(values: torch.Tensor) -> list[torch.Tensor]:
    return list(values.detach().split(LENGTHS))


def gradient(policy, values: list[torch.Tensor], groups, weights, given, loss=rloo) -> torch.Tensor:
    """Σ weight·∇loss over groups of answers (their numbers), by the trainer's advantages and the trainer's loss."""
    logps = token_logps(policy)
    advantages = advantages_of([tuple(values[i] for i in group) for group in groups], given)
    places = torch.cat([torch.arange(ENDS[i], ENDS[i + 1]) for group in groups for i in group])
    each = torch.cat([weight * a for weight, answers in zip(weights, advantages, strict=True) for a in answers])
    total = torch.zeros(len(logps), dtype=torch.float64).index_add(0, places, each.double() / len(groups[0]))
    # The loss is linear in the advantages at the policy that sampled, so that one call has all groups.
    sampled = SampledAnswers(logps, logps.detach(), ENDS, total, n=len(groups[0]), beta=BETA, clip_range=0.2)
    return flat_gradient(loss(sampled).sum(), policy)


def expected_gradient(policy, values: list[torch.Tensor], given, loss=rloo) -> torch.Tensor:
    """Σ π(y)π(y')·∇loss over all pairs of answers."""
    chances = answer_logps(policy, PROMPT).detach().exp()
    return gradient(policy, values, PAIRS, torch.outer(chances, chances).flatten(), given, loss)


@pytest.mark.parametrize("loss", [rloo, ppo])
@pytest.mark.parametrize("kl_in", ["none", "reward"])
def test_the_expected_gradient_is_that_of_the_summed_rewards(bed, rewards, loss, kl_in):
    """γ = 1: Σ π(y)π(y')·∇loss = −∇(E[Σ_t r_t] − β KL(π ‖ π_ref)), as with the sequence's credit."""
    reference, policy = bed
    logps, ref = answer_logps(policy, PROMPT), answer_logps(reference, PROMPT).detach()
    whole, values = torch.stack([r.sum() for r in rewards]), rewards
    if kl_in == "reward":
        whole = whole - BETA * (logps - ref)
        values = less_kl([tuple(rewards)], BETA, *([by_answer(token_logps(m))] for m in (policy, reference)))[0]
    exact = -flat_gradient(logps.exp() @ whole, policy)
    assert exact.norm() > 0.1
    for credit in ("token", "sequence"):
        found = expected_gradient(policy, values, config(credit), loss)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [rloo, ppo])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_the_expected_gradient_is_that_of_a_policy_improvement_step_on_discounted_values(bed, rewards, gamma, loss):
    """Σ π(y)π(y')·∇loss = −∇ Σ_t E_{s_t ~ π_old} E_{a ~ π}[Q_γ(s_t, a)] at π = π_old.

    Q_γ(s_t, a) = E[Σ_{u ≥ t} γ^(u − t)·r_u] under π_old. So each token is made likelier by its own discounted value, in
    the states that the policy visits.
    """
    _, policy = bed
    logps = token_logps(policy)
    chances = answer_logps(policy, PROMPT).detach().exp()
    seen, weight, value = {}, {}, {}  # by prefix with its last token: its place, chance and summed value
    for k, answer in enumerate(ANSWERS):
        for t in range(len(answer)):
            key, later = tuple(answer[: t + 1]), rewards[k][t:]
            discounted = (gamma ** torch.arange(len(later), dtype=torch.float64)) @ later
            seen[key] = int(ENDS[k]) + t
            weight[key] = weight.get(key, 0) + chances[k]
            value[key] = value.get(key, 0) + chances[k] * discounted
    terms = []
    for key, place in seen.items():
        visited = weight[key[:-1]] if len(key) > 1 else 1.0
        terms.append(visited * logps[place].exp() * (value[key] / weight[key]))
    exact = -flat_gradient(torch.stack(terms).sum(), policy)
    found = expected_gradient(policy, rewards, config(gamma=gamma), loss)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_the_advantages_of_the_first_token_and_of_the_whole_answer_are_equal(rewards):
    """γ = 1. A later advantage lacks the rewards before it: the differences of neighbours sum to the answer's."""
    groups = [tuple(rewards[i] for i in pair) for pair in PAIRS[:200]]
    tokens, whole = advantages_of(groups, config()), advantages_of(groups, config("sequence"))
    different = 0
    for group, answers, answers_whole in zip(groups, tokens, whole, strict=True):
        for a, b in zip(answers, answers_whole, strict=True):
            torch.testing.assert_close(a[0], b[0])
            different += not torch.allclose(a, b)
        steps = [torch.cat([a[:-1] - a[1:], a[-1:]]).sum() for a in answers]
        torch.testing.assert_close(torch.stack(steps), (totals([group]) - totals([group]).flip(1))[0].float())
    assert different > 100


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_a_reward_at_the_last_token_gives_every_token_the_advantage_of_the_answer(credit):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(len(ANSWERS), generator=generator, dtype=torch.float64)
    ends = [torch.cat([torch.zeros(n - 1, dtype=torch.float64), r[None]]) for n, r in zip(LENGTHS, whole, strict=True)]
    for i, j in PAIRS[:200]:
        (first, second), difference = advantages_of([(ends[i], ends[j])], config(credit))[0], whole[i] - whole[j]
        torch.testing.assert_close(first, difference.float().expand(LENGTHS[i]))
        torch.testing.assert_close(second, -difference.float().expand(LENGTHS[j]))


def test_whitened_advantages_have_a_standard_deviation_of_one(rewards):
    groups = [tuple(rewards[i] for i in pair) for pair in PAIRS[:200] if pair[0] != pair[1]]
    for credit in ("token", "sequence"):
        answers = [a for group in advantages_of(groups, config(credit, whiten_rewards=True)) for a in group]
        values = torch.cat([a[:1] if credit == "sequence" else a for a in answers])
        assert values.std().item() == pytest.approx(1, abs=1e-5)


def test_penalties_are_those_of_the_tokens_that_incur_them():
    given = SimpleNamespace(length_penalty=0.5, missing_eos_penalty=2.0)
    group = PromptGroup([1], ([5, 6, 0], [5, 6]))
    zeros = (torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    ended, cut = less_penalties([zeros], [group], given, ends=[0])[0]
    assert ended.tolist() == [-0.5, -0.5, -0.5]
    assert cut.tolist() == [-0.5, -2.5]


# ---------------------------------------------------------------- token rewards of policies


def implicit(expert, reference, policy) -> list[torch.Tensor]:
    """β·log π_E(y_t)/π_ref(y_t) − β·log π(y_t)/π_ref(y_t) of every token of every answer."""
    of = {m: by_answer(token_logps(m)) for m in (expert, reference, policy)}
    reward = [BETA * (e - r) for e, r in zip(of[expert], of[reference], strict=True)]
    return list(less_kl([tuple(reward)], BETA, [of[policy]], [of[reference]])[0])


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_expert_is_the_fixed_point_of_its_own_token_rewards(bed, gamma):
    """With r_t = β·log π_E(y_t)/π_ref(y_t) and KL to π_ref, all advantages are 0 at π_E, and descent reaches π_E."""
    reference, expert = model(1), model(3)
    for pair in advantages_of([tuple(implicit(expert, reference, expert))], config(gamma=gamma))[0]:
        assert pair.abs().max() < 1e-7
    policy = model(2)
    before = kl_at(expert, policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-2)
    torch.manual_seed(0)
    for step in range(150):
        for settings in optimizer.param_groups:
            settings["lr"] = 2e-2 * (1 - step / 150)
        drawn = (
            torch.multinomial(answer_logps(policy, PROMPT).detach().exp(), 64, replacement=True).view(-1, 4).tolist()
        )
        rewards = implicit(expert, reference, policy)
        step_gradient = gradient(policy, rewards, drawn, [1 / len(drawn)] * len(drawn), config(gamma=gamma))
        for parameter, part in zip(policy.parameters(), split_like(step_gradient, policy), strict=True):
            parameter.grad = part
        optimizer.step()
    assert before > 0.5
    assert kl_at(expert, policy) < 0.02


def kl_at(expert, policy) -> float:
    p, logq = answer_logps(expert, PROMPT).detach(), answer_logps(policy, PROMPT).detach()
    return (p.exp() * (p - logq)).sum().item()


def split_like(gradient: torch.Tensor, policy) -> list[torch.Tensor]:
    sizes = [parameter.numel() for parameter in policy.parameters()]
    return [g.view_as(p) for g, p in zip(gradient.split(sizes), policy.parameters(), strict=True)]


# ---------------------------------------------------------------- in a run

KEYS = {
    "method": "rft",
    "stages": 1,
    "align_rounds": 2,
    "num_generations": 3,
    "sft_nll_steps": 6,
    "reward_data": "none",
    "implicit_reward_policy": "sft",
    "implicit_reward_reference": "sft-nll",
    "reward_credit": "token",
    "kl_in": "reward",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("credit") / "run"
    run(output, **KEYS)
    return output


def test_the_rewards_of_a_run_are_log_ratios_of_its_own_two_policies(finished):
    stage = finished / "stage-00"
    new, old = (load_file(stage / f"{name}.safetensors")["values"] for name in ("reward-0", "reward-0-reference"))
    metrics = json.loads((stage / "round.json").read_text())
    ratio = 0.5 * (new.double() - old.double()).sum().item()  # beta is 0.5
    assert metrics["reward"] == pytest.approx(ratio / metrics["answers"], rel=1e-6)
    assert metrics["kl"] != 0  # the second round's policy is no longer that of SFT


MOMENTS = [
    "stage-00/round-00/reward-0.safetensors",
    "stage-00/round-00/DONE",
    "stage-00/reward-0-reference.safetensors",
]


@full
@pytest.mark.parametrize("moments", one_run_or_each_its_own(MOMENTS))
def test_a_run_that_is_killed_at_any_moment_resumes_to_the_same_bytes(finished, tmp_path, moments):
    run_killed_at(tmp_path / "run", moments, **KEYS)
    run(tmp_path / "run", **KEYS)
    assert contents(tmp_path / "run" / "final") == contents(finished / "final")


R_AIRL = {"method": "r_airl", "align_rounds": 2, "num_generations": 3, "reward_learning_rate": 1e-3, "kl_in": "reward"}


@full
def test_r_airl_learns_rewards_of_tokens_in_every_round_and_resumes_to_the_same_bytes(tmp_path):
    run(tmp_path / "whole", **R_AIRL, stages=1)
    for number in range(2):
        place = tmp_path / "whole/stage-00" / ("round-00" if number == 0 else "")
        saved = load_file(place / "reward-0.safetensors")
        assert saved["values"].shape == (saved["lengths"].sum(), 1)
        assert saved["lengths"].float().std() > 0
    moments = ["stage-00/round-00/reward/DONE", "stage-00/round-00/DONE"]
    run_killed_at(tmp_path / "run", moments, **R_AIRL, stages=1)
    run(tmp_path / "run", **R_AIRL, stages=1)
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "whole" / "final")
