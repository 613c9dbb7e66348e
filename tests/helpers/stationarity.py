"""IRFT (arXiv 2405.17888, algorithm 2) on the exact test bed, with the norm of the likelihood's gradient."""

import torch
from torch import Tensor

from tests.helpers.exact import PROMPTS, answer_logps, flat_gradient, model

EXPERT, START = 1, 2  # seeds of the two policies
PAIRS = 16  # per prompt and step
SCALE = 0.02  # the learning rate is SCALE / √(T·K), as the theorem has it


def squared_norms(stages: int, inner_steps: int, seed: int = 0, scale: float = SCALE) -> list[float]:
    """Return ‖∇ℓ(θ)‖² before every step of T stages of K steps, for ℓ(θ) = E log π_θ(y|x) over experts and prompts.

    A stage draws its synthetic answers from the policy at its start. Each step has pairs of its own, and the gradient
    of the linear loss on them.
    """
    policy, expert = model(START), model(EXPERT)
    torch.manual_seed(seed)  # after the models, which set the seed too
    with torch.no_grad():
        experts = [answer_logps(expert, prompt).exp() for prompt in PROMPTS]
    rate = scale / (stages * inner_steps) ** 0.5
    norms = []
    for _ in range(stages):
        with torch.no_grad():
            sampled = [answer_logps(policy, prompt).exp() for prompt in PROMPTS]
        for _ in range(inner_steps):
            logps = [answer_logps(policy, prompt) for prompt in PROMPTS]
            likelihood = sum(p @ q for p, q in zip(experts, logps, strict=True)) / len(PROMPTS)
            norms.append(flat_gradient(likelihood, policy).square().sum().item())
            margins = [(share_of(p) - share_of(q)) @ r for p, q, r in zip(experts, sampled, logps, strict=True)]
            step(policy, flat_gradient(sum(margins) / len(PROMPTS), policy), rate)
    return norms


def share_of(probabilities: Tensor) -> Tensor:
    """Draw ``PAIRS`` answers, and return the share of each answer among them."""
    drawn = torch.multinomial(probabilities, PAIRS, replacement=True)
    return torch.bincount(drawn, minlength=len(probabilities)).double() / PAIRS


@torch.no_grad()
def step(policy: torch.nn.Module, gradient: Tensor, rate: float) -> None:
    """Move the policy along a flat gradient."""
    parameters = list(policy.parameters())
    for parameter, part in zip(parameters, gradient.split([each.numel() for each in parameters]), strict=True):
        parameter += rate * part.view_as(parameter)
