"""The operations in plain PyTorch: the oracle that every other backend is tested against. Holds ``[N, V]`` logits."""

import torch
from torch import Tensor

from irlfast.ops.common.types import Coupling, Problem, Side, objective


def token_logps(policy: Side, reference: Side | None, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities ``[N]`` of the targets, 0 where skipped: the policy's, differentiable, and the reference's."""
    logps = score(policy, problem)
    if reference is None:
        return logps, None
    with torch.no_grad():
        return logps, score(reference, problem)


def pair_loss(
    policy: Side, reference: Side | None, problem: Problem, coupling: Coupling, weight_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss ``[]``, differentiable, and the log-probabilities ``[N]`` of policy and reference, detached."""
    if weight_grad is not None:
        policy = policy._replace(weight=policy.weight.detach().to(problem.dtype).requires_grad_())
    logps, ref_logps = token_logps(policy, reference, problem)
    loss = objective(logps, ref_logps, problem, coupling)
    if weight_grad is not None:
        weight_grad += torch.autograd.grad(loss, policy.weight, retain_graph=True)[0]
    return loss, logps.detach(), ref_logps


def score(side: Side, problem: Problem) -> Tensor:
    tokens = problem.scored()
    hidden, weight = side.hidden.to(problem.dtype), side.weight.to(problem.dtype)
    bias = None if side.bias is None else side.bias.to(problem.dtype)
    # Cast before selecting: the gradients of a row that is used twice then add up in fp32.
    logits = torch.nn.functional.linear(hidden[problem.rows_of(tokens)], weight, bias) * problem.logit_scale
    if problem.logit_softcap is not None:
        logits = problem.logit_softcap * torch.tanh(logits / problem.logit_softcap)
    logps = logits.log_softmax(-1).gather(1, problem.targets[tokens, None]).squeeze(1)
    return logps.new_zeros(problem.targets.shape).index_put((tokens,), logps)
