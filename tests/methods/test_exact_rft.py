"""RFT and AfD against closed forms, on the exact test bed: rewards, unbiased gradients, fixed points, modes."""

import functools
from types import SimpleNamespace

import pytest
import torch

from irlfast import ops
from irlfast.data.packing import PromptGroup, pack
from irlfast.engine.module import Policy
from irlfast.losses.inputs import Normalisers
from irlfast.losses.policy import align_loss
from irlfast.losses.rewards import reward_loss
from irlfast.methods.credit import advantages_of
from irlfast.ops import Head
from irlfast.sampling.mismatch import importance_weights
from tests.helpers.exact import ANSWERS, PROMPTS, answer_logps, flat_gradient, model
from tests.helpers.prepared import prepared
from tests.helpers.tiers import slow

BETA = 0.7
PROMPT = PROMPTS[0]


@pytest.fixture(scope="module")
def bed():
    return model(1), model(2)  # expert, policy


def rewards_at(seed: int) -> torch.Tensor:
    """An arbitrary reward of every answer."""
    return torch.randn(len(ANSWERS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- what a reward model learns


def learned(kind: str, expert: torch.Tensor, policy: torch.Tensor, alpha: float = 0.5):
    """The logits of every answer that the trainer's loss is least at, over all functions of the answer, by Newton-like
    descent on expectations: every pair (y, ỹ) once, weighted by π_E(y)·π(ỹ), through one hidden row an answer."""
    count = len(expert)
    logits = torch.zeros(count, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    head = Head(torch.ones(1, 1, dtype=torch.float64), None, 1.0, None)
    ends = torch.arange(3, dtype=torch.int32)

    def pair(i: int, j: int) -> torch.Tensor:
        batch = SimpleNamespace(rows=torch.tensor([i, j]), cu_seqlens=ends)
        options = {"kind": kind, "level": "sequence", "alpha": alpha, "regularization": 0.1}
        return reward_loss(logits, head, batch, Normalisers(1, 1), **options)[0]

    def closure():
        optimizer.zero_grad()
        loss = sum(expert[i] * policy[j] * pair(i, j) for i in range(count) for j in range(count))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().flatten()


FEW = 5  # answers, renormalised: 25 pairs are enough to tell a closed form


@pytest.fixture(scope="module")
def densities(bed):
    expert, policy = (answer_logps(m, PROMPT).detach()[:FEW].softmax(0) for m in bed)
    return expert, policy


@pytest.mark.parametrize("kind", ["bradley_terry", "bce", "airl", "gail", "fairl", "alpha"])
def test_the_learned_reward_is_the_log_density_ratio(densities, kind):
    """h* = log π_E/π, for Bradley–Terry up to a constant of the prompt: RFT's reward is log(π_E/π_ref) + c(x)."""
    expert, policy = densities
    found, exact = learned(kind, expert, policy), (expert / policy).log()
    if kind == "bradley_terry":
        found, exact = found - found.mean(), exact - exact.mean()
    assert exact.abs().max() > 0.3
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_the_linear_loss_has_its_closed_form(densities):
    """−(r(y) − r(ỹ)) + λ(r(y)² + r(ỹ)²) is least at (π_E − π)/(2λ(π_E + π))."""
    expert, policy = densities
    found = learned("linear", expert, policy)
    torch.testing.assert_close(found, (expert - policy) / (0.2 * (expert + policy)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "reward"),
    [
        ("airl", lambda h: h),
        ("gail", lambda h: torch.nn.functional.softplus(h)),
        ("fairl", torch.exp),
        ("alpha", lambda h: 2 * (torch.exp(h / 2) - 1)),
    ],
)
def test_a_step_on_each_divergences_reward_lowers_that_divergence(bed, kind, reward):
    """∇_θ E_π[r(h*)] with the optimal discriminator is −∇ D_f(π_E ‖ π), up to JS's half: f-MAX (arXiv 1911.02256)."""
    expert, policy = bed
    p, logq = answer_logps(expert, PROMPT).detach().exp(), answer_logps(policy, PROMPT)
    q, h = logq.exp(), (p.log() - logq)
    divergences = {
        "airl": (q * -h).sum(),
        "gail": 0.5 * (p * (2 * p / (p + q)).log()).sum() + 0.5 * (q * (2 * q / (p + q)).log()).sum(),
        "fairl": (p * h).sum(),
        "alpha": 4 * (1 - (p * q).sqrt().sum()),
    }
    found = ops.discriminator_reward(h.detach(), kind=kind, alpha=0.5)
    torch.testing.assert_close(found, reward(h.detach()))
    towards = flat_gradient(q @ found, policy)
    exact = -flat_gradient(divergences[kind], policy) * (2 if kind == "gail" else 1)
    assert exact.norm() > 0.01
    torch.testing.assert_close(towards, exact, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- aligning a policy to a reward


def groups_of(policy, reference, chosen: list[tuple[int, ...]], reward: torch.Tensor, align: str, kl_in: str):
    """Segments of the trainer for groups of answers (indices), with advantages by its own rule."""
    old, ref = (answer_logps(m, PROMPT).detach() for m in (policy, reference))
    index = torch.tensor(chosen)
    values = reward[index] - (BETA * (old - ref)[index] if kl_in == "reward" else 0)
    config = SimpleNamespace(align=align, whiten_rewards=False, reward_credit="sequence", gamma=1.0)
    ends = [
        tuple(at_the_end(r, ANSWERS[i]) for r, i in zip(*both, strict=True))
        for both in zip(values, chosen, strict=True)
    ]
    advantages = advantages_of(ends, config)
    scored = {m: tokens_of(m) for m in (policy, reference)}
    return [
        PromptGroup(
            PROMPT,
            tuple(ANSWERS[i] for i in group),
            old_logps=tuple(scored[policy][i] for i in group),
            ref_logps=tuple(scored[reference][i] for i in group) if kl_in == "loss" else (),
            advantages=values,
        )
        for group, values in zip(chosen, advantages, strict=True)
    ]


def at_the_end(reward: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """The rewards of an answer's tokens where the last one has them all."""
    return torch.tensor([0.0] * (len(answer) - 1) + [reward.item()], dtype=torch.float64)


def tokens_of(policy) -> list[torch.Tensor]:
    """Log-probability of every token of every answer."""
    from irlfast.losses.inputs import arguments
    from irlfast.models.forward import hidden_states

    batch = pack([PromptGroup(PROMPT, (answer,)) for answer in ANSWERS])
    with torch.no_grad():
        logps = ops.log_ratio(hidden_states(policy, batch), **arguments(ops.lm_head(policy), batch), backend="plain")
    return list(logps.token_logps.split([len(answer) for answer in ANSWERS]))


def aligned_loss(policy, groups, align: str, kl_in: str) -> torch.Tensor:
    options = {"align": align, "answers": len(groups[0].answers), "beta": BETA, "kl_in_loss": kl_in == "loss"}
    loss = functools.partial(align_loss, **options, clip_range=0.2)
    return Policy(prepared(policy), loss)(pack(groups), Normalisers(len(groups), 1))[0]


def objective(policy, reference, reward):
    """E_π[r] − β KL(π ‖ π_ref)."""
    logps, ref = answer_logps(policy, PROMPT), answer_logps(reference, PROMPT).detach()
    return logps.exp() @ (reward - BETA * (logps - ref))


OBJECTIVES = [  # the loss of apa holds the KL already
    *(("rloo", "loss"), ("ppo", "reward"), ("apa", "reward")),
    *(pytest.param(*others, marks=slow) for others in (("rloo", "reward"), ("ppo", "loss"))),
]


@pytest.mark.parametrize(("align", "kl_in"), OBJECTIVES)
def test_the_expected_gradient_is_that_of_the_objective_by_enumeration(bed, align, kl_in):
    """Over all pairs of answers drawn independently from the policy, Σ π(y)π(y') ∇loss = −∇(E[r] − β KL(π ‖ π_ref))."""
    reference, policy = bed
    reward = rewards_at(0)
    exact = -flat_gradient(objective(policy, reference, reward), policy)
    q = answer_logps(policy, PROMPT).detach().exp()
    count = len(ANSWERS)
    chosen = [(i, j) for i in range(count) for j in range(count)]
    groups = groups_of(policy, reference, chosen, reward, align, kl_in)
    gradients = [flat_gradient(aligned_loss(policy, [group], align, kl_in), policy) for group in groups]
    total = torch.outer(q, q).flatten() @ torch.stack(gradients)
    scale = 0.5 if align == "apa" else 1.0  # centring two answers by their own mean halves the gradient: (n − 1)/n
    torch.testing.assert_close(total, scale * exact, rtol=1e-6, atol=1e-7)


def weighted(groups, chosen, sampler, mode: str, clip_max: float | None):
    """The groups with the weights of answers that were drawn by another policy."""
    drawn_with = tokens_of(sampler)
    return [
        group._replace(
            weights=tuple(
                importance_weights(old, drawn_with[i], mode, clip_max)
                for old, i in zip(group.old_logps, indices, strict=True)
            )
        )
        for group, indices in zip(groups, chosen, strict=True)
    ]


@pytest.mark.parametrize(
    ("align", "kl_in", "how", "unbiased"),
    [
        ("rloo", "reward", ("sequence_truncate", None), True),
        ("ppo", "loss", ("sequence_mask", None), True),
        ("rloo", "loss", ("sequence_truncate", 1.0), False),
        ("ppo", "reward", None, False),
    ],
)
def test_with_weights_the_gradient_of_another_samplers_answers_is_unbiased(bed, align, kl_in, how, unbiased):
    """Over all pairs drawn independently from q, Σ q(y)q(y') ∇loss with weights π/q is −∇(E_π[r] − β KL(π ‖ π_ref)).

    Without weights, and with weights that are cut, it is not.
    """
    reference, policy = bed
    exact = -flat_gradient(objective(policy, reference, rewards_at(0)), policy)
    total = expected_gradient(policy, reference, model(4), align, kl_in, how)
    if unbiased:
        torch.testing.assert_close(total, exact, rtol=1e-6, atol=1e-7)
    else:
        assert (total - exact).norm() > 0.05 * exact.norm()


def expected_gradient(policy, reference, sampler, align, kl_in, how):
    """The gradient of the loss, over all pairs of answers that are drawn independently from ``sampler``.

    ``how`` is the mode and the bound of the weights (None: no weights).
    """
    q = answer_logps(sampler, PROMPT).detach().exp()
    count = len(ANSWERS)
    chosen = [(i, j) for i in range(count) for j in range(count)]
    groups = groups_of(policy, reference, chosen, rewards_at(0), align, kl_in)
    groups = weighted(groups, chosen, *(sampler, *how) if how else (policy, "token_truncate", None))
    chances = torch.outer(q, q).flatten() * len(groups)  # the gradient is linear in the weights: all pairs at once
    groups = [
        group._replace(weights=tuple(chance * weights.double() for weights in group.weights))
        for group, chance in zip(groups, chances, strict=True)
    ]
    return flat_gradient(aligned_loss(policy, groups, align, kl_in), policy)


@pytest.mark.parametrize(("align", "kl_in"), [("rloo", "loss"), ("ppo", "reward")])
def test_with_weights_the_gradient_of_answers_of_an_earlier_step_is_unbiased(bed, align, kl_in):
    """As with ``async_sampling``: the policy that answered is that of 20 steps before the one whose gradient is taken.

    Without weights it is not.
    """
    reference, earlier, policy = bed[0], bed[1], model(2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (-objective(policy, reference, rewards_at(1))).backward()
        optimizer.step()
    exact = -flat_gradient(objective(policy, reference, rewards_at(0)), policy)
    total = expected_gradient(policy, reference, earlier, align, kl_in, ("sequence_truncate", None))
    torch.testing.assert_close(total, exact, rtol=1e-6, atol=1e-7)
    unweighted = expected_gradient(policy, reference, earlier, align, kl_in, None)
    assert (unweighted - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("align", ["rloo", "ppo", "grpo"])
def test_the_weights_of_a_sampler_that_is_the_policy_change_no_bit(bed, align, mode):
    reference, policy = bed
    chosen = [(0, 3, 5), (7, 1, 2)]
    for kl_in in ("reward", "loss"):
        groups = groups_of(policy, reference, chosen, rewards_at(0), align, kl_in)
        same = weighted(groups, chosen, policy, mode, 1.0)
        assert all((weights == 1).all() for group in same for weights in group.weights)
        losses = [aligned_loss(model(3), each, align, kl_in) for each in (groups, same)]
        assert torch.equal(*losses)
        gradients = []
        for each in (groups, same):
            trained = model(3)
            gradients.append(flat_gradient(aligned_loss(trained, each, align, kl_in), trained))
        assert torch.equal(*gradients)


def test_apa_is_least_at_the_kl_regularised_optimum(bed):
    """π_ref·exp(r/β), normalised, from whatever policy the answers came: one group of all, every answer once."""
    expert, old = bed
    reference = model(3)
    reward = BETA * (answer_logps(expert, PROMPT) - answer_logps(reference, PROMPT)).detach() + 3.0
    group = groups_of(old, reference, [tuple(range(len(ANSWERS)))], reward, "apa", "reward")
    assert aligned_loss(expert, group, "apa", "reward").item() == pytest.approx(0, abs=1e-9)
    policy = model(2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    before = aligned_loss(policy, group, "apa", "reward").item()
    for step in range(600):
        for settings in optimizer.param_groups:
            settings["lr"] = 1e-2 * (1 - step / 600)
        optimizer.zero_grad()
        aligned_loss(policy, group, "apa", "reward").backward()
        optimizer.step()
    assert before > 0.5
    assert kl_at(expert, policy) < 0.02 * kl_at(expert, old)


def kl_at(expert, policy) -> float:
    p, logq = answer_logps(expert, PROMPT).detach(), answer_logps(policy, PROMPT).detach()
    return (p.exp() * (p - logq)).sum().item()


@pytest.mark.parametrize("align", ["rloo", pytest.param("ppo", marks=slow)])
def test_alignment_reaches_the_expert_from_its_own_reward(bed, align):
    """r = β log(π_E/π_ref) + c(x): the policy that raises it with KL to π_ref is the expert."""
    expert, reference = bed
    reward = BETA * (answer_logps(expert, PROMPT) - answer_logps(reference, PROMPT)).detach() + 3.0
    policy = model(2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    torch.manual_seed(0)
    steps = 300
    for step in range(steps):
        q = answer_logps(policy, PROMPT).detach().exp()
        drawn = torch.multinomial(q, 256, replacement=True).view(-1, 4).tolist()
        groups = groups_of(policy, reference, [tuple(group) for group in drawn], reward, align, "reward")
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        aligned_loss(policy, groups, align, "reward").backward()
        optimizer.step()
    assert kl_at(expert, reference) > 1
    assert kl_at(expert, policy) < 0.05


# ---------------------------------------------------------------- forward and reverse KL


def test_forward_kl_covers_modes_and_reverse_kl_seeks_one():
    """An expert of two modes, [1, 1] and [2, 2], and a policy whose second token does not see the first: it cannot fit.

    Forward KL (SFT's) gives the answers [1, 2] and [2, 1], which the expert never gives, half of its mass; reverse KL
    (the reward log π_E/π) gives one mode nearly all.
    """
    eps = 1e-4
    expert = torch.full((2, 2), eps)
    expert[0, 0] = expert[1, 1] = 0.5 - eps
    results = {}
    for name in ("forward", "reverse"):
        logits = torch.tensor([[0.1, 0.0], [0.1, 0.0]], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(600):
            logps = logits.log_softmax(1)
            joint = logps[0][:, None] + logps[1][None, :]
            if name == "forward":
                loss = -(expert * joint).sum()
            else:  # the policy gradient of AfD, by enumeration: −E_π[A] with the discriminator's optimum as reward
                reward = ops.discriminator_reward((expert.double().log() - joint).detach(), kind="airl")
                loss = -(joint.exp() * (reward - (joint.exp() * reward).sum().detach())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results[name] = joint.exp().detach()
    forward, reverse = results["forward"], results["reverse"]
    assert (forward[0, 1] + forward[1, 0]).item() == pytest.approx(0.5, abs=0.01)
    assert max(reverse[0, 0].item(), reverse[1, 1].item()) > 0.95
