"""``token_divergence`` in plain PyTorch, by several ``[N, V]`` tensors: the oracle of every other backend."""

import math

import torch
from torch import Tensor

from irlfast.ops.common.types import HeadInputs
from irlfast.ops.divergence.mixtures import DivergenceSpec
from irlfast.ops.logits.plain import final_logits
from irlfast.ops.pair_loss.plain import products


def token_divergence(policy: HeadInputs, reference: HeadInputs, spec: DivergenceSpec) -> Tensor:
    """The divergence ``[N]`` of every row, differentiable in the policy."""
    z, ref_z = products(policy, spec.rows, spec.operands), products(reference, spec.ref_rows, spec.operands)
    q = final_logits(z, spec.logit_scale, spec.logit_softcap).log_softmax(-1)
    r = final_logits(ref_z, spec.ref_logit_scale, spec.ref_logit_softcap).log_softmax(-1)
    if spec.top_k:
        top = (r if spec.top_k_of == "reference" else q).topk(spec.top_k).indices
        q, r = (over_top_k(logps, top, spec.tail) for logps in (q, r))
    m = log_mixture(r, q, spec.ref_share)
    return spec.by_ref * kl(r, m) + spec.by_policy * kl(q, m)


def over_top_k(logps: Tensor, top: Tensor, tail: bool) -> Tensor:
    """Log-probabilities of the top tokens, and of all others together where ``tail``, else among the top tokens."""
    best = logps.gather(-1, top)
    if not tail:
        return best.log_softmax(-1)
    others = logps.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([best, others], -1)


def log_mixture(r: Tensor, q: Tensor, ref_share: float) -> Tensor:
    if ref_share in (0, 1):
        return r if ref_share else q
    return torch.logaddexp(r + math.log(ref_share), q + math.log1p(-ref_share))


def kl(p: Tensor, m: Tensor) -> Tensor:
    """KL(p ‖ m) of every row, from log-probabilities."""
    return (p.exp() * (p - m)).sum(-1)
