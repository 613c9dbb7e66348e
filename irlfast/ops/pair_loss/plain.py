"""``log_ratio`` and ``pair_loss`` in plain PyTorch, with ``[N, V]`` logits: the oracle of every other backend."""

import torch
from torch import Tensor

from irlfast.ops.common.precision import operand
from irlfast.ops.common.types import HeadInputs, PairLoss, PairLossSpec, ScoredTokens
from irlfast.ops.logits import plain
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


def token_statistics(
    policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-probabilities, entropies and log-sum-exps of the policy, differentiable, and the reference's first, ``[N]``.

    Without ``reference``, the last result is the cached one, ``[N]`` or ``[S]``, if any.
    """
    tokens = scored.indices()
    options = scored.targets[tokens], scored.logit_scale, scored.logit_softcap
    values = plain.token_statistics(products(policy, scored.rows_of(tokens), scored.operands), *options)
    logps, entropies, lses = (scored.zeros().index_put((tokens,), value) for value in values)
    if reference is None:
        return logps, entropies, lses, scored.ref_logps
    with torch.no_grad():
        return logps, entropies, lses, score(reference, scored)


def score(inputs: HeadInputs, scored: ScoredTokens) -> Tensor:
    tokens = scored.indices()
    logits = products(inputs, scored.rows_of(tokens), scored.operands)
    logps = plain.token_logps(logits, scored.targets[tokens], scored.logit_scale, scored.logit_softcap)
    return scored.zeros().index_put((tokens,), logps)


def products(inputs: HeadInputs, rows: Tensor | None, operands: torch.dtype) -> Tensor:
    """Logits ``[n, V]`` of these hidden rows, or of all, before scale and soft-cap; operands are of this dtype."""
    # Cast before selecting: the gradients of a row that is used twice then add up in fp32.
    hidden, weight = operand(inputs.hidden, operands), operand(inputs.weight, operands)
    bias = None if inputs.bias is None else inputs.bias.to(hidden.dtype)
    return torch.nn.functional.linear(hidden if rows is None else hidden[rows], weight, bias)
