"""The operations in plain PyTorch: the oracle that every other backend is tested against. Holds ``[N, V]`` logits."""

import torch
from torch import Tensor

from irlfast.ops.common.types import HeadInputs, PairLossSpec, ScoredTokens, objective


def token_logps(policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities ``[N]`` of the targets, 0 where skipped: the policy's, differentiable, and the reference's."""
    logps = score(policy, scored)
    if reference is None:
        return logps, None
    with torch.no_grad():
        return logps, score(reference, scored)


def pair_loss(
    policy: HeadInputs,
    reference: HeadInputs | None,
    scored: ScoredTokens,
    spec: PairLossSpec,
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss ``[]``, differentiable, and the log-probabilities ``[N]`` of policy and reference, detached."""
    if weight_grad is not None:
        policy = policy._replace(weight=policy.weight.detach().to(scored.dtype).requires_grad_())
    logps, ref_logps = token_logps(policy, reference, scored)
    loss = objective(logps, ref_logps, scored, spec)
    if weight_grad is not None:
        weight_grad += torch.autograd.grad(loss, policy.weight, retain_graph=True)[0]
    return loss, logps.detach(), ref_logps


def score(side: HeadInputs, scored: ScoredTokens) -> Tensor:
    tokens = scored.indices()
    hidden, weight = side.hidden.to(scored.dtype), side.weight.to(scored.dtype)
    bias = None if side.bias is None else side.bias.to(scored.dtype)
    # Cast before selecting: the gradients of a row that is used twice then add up in fp32.
    logits = torch.nn.functional.linear(hidden[scored.rows_of(tokens)], weight, bias) * scored.logit_scale
    if scored.logit_softcap is not None:
        logits = scored.logit_softcap * torch.tanh(logits / scored.logit_softcap)
    logps = logits.log_softmax(-1).gather(1, scored.targets[tokens, None]).squeeze(1)
    return logps.new_zeros(scored.targets.shape).index_put((tokens,), logps)
