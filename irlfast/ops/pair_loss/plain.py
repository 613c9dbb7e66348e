"""``log_ratio`` and ``pair_loss`` in plain PyTorch, with ``[N, V]`` logits: the oracle of every other backend."""

import torch
from torch import Tensor

from irlfast.ops.common.precision import operand
from irlfast.ops.common.types import HeadInputs, PairLoss, PairLossSpec, ScoredTokens
from irlfast.ops.pair_loss.objective import objective


def token_logps(policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities ``[N]`` of the targets, 0 where skipped: the policy's, differentiable, and the reference's.

    Without ``reference``, the second result is the cached one, ``[N]`` or ``[S]``, if any.
    """
    logps = score(policy, scored)
    if reference is None:
        return logps, scored.ref_logps
    with torch.no_grad():
        return logps, score(reference, scored)


def pair_loss(policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens, spec: PairLossSpec) -> PairLoss:
    """The loss, differentiable, and the statistics."""
    logps, ref_logps = token_logps(policy, reference, scored)
    return objective(logps, ref_logps, scored, spec)


def score(inputs: HeadInputs, scored: ScoredTokens) -> Tensor:
    tokens = scored.indices()
    # Cast before selecting: the gradients of a row that is used twice then add up in fp32.
    hidden, weight = operand(inputs.hidden, scored.operands), operand(inputs.weight, scored.operands)
    bias = None if inputs.bias is None else inputs.bias.to(scored.dtype)
    logits = torch.nn.functional.linear(hidden[scored.rows_of(tokens)], weight, bias) * scored.logit_scale
    if scored.logit_softcap is not None:
        logits = scored.logit_softcap * torch.tanh(logits / scored.logit_softcap)
    logps = logits.log_softmax(-1).gather(1, scored.targets[tokens, None]).squeeze(1)
    return logps.new_zeros(scored.targets.shape).index_put((tokens,), logps)
