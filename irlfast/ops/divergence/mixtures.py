"""The table of divergences. All are one formula, whose three numbers are a :class:`Mixture`.

Between a policy q and a reference r over the vocabulary, with their mixture m,

    D = by_ref · KL(r ‖ m) + by_policy · KL(q ‖ m),   m = ref_share · r + (1 − ref_share) · q,

where KL(p ‖ m) = Σ_v p_v log(p_v / m_v).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Mixture(NamedTuple):
    ref_share: float  # of the reference in the mixture; 0 and 1 are the policy and the reference alone
    by_ref: float
    by_policy: float


# kind -> (beta, alpha) -> its numbers
DIVERGENCES: dict[str, Callable[[float, float], Mixture]] = {
    "forward_kl": lambda beta, alpha: Mixture(0.0, 1.0, 0.0),  # KL(r ‖ q)
    "reverse_kl": lambda beta, alpha: Mixture(1.0, 0.0, 1.0),  # KL(q ‖ r)
    # β KL(r ‖ m) + (1 − β) KL(q ‖ m), m = β r + (1 − β) q: GKD, arXiv 2306.13649, eq. 1
    "jensen_shannon": lambda beta, alpha: Mixture(beta, beta, 1 - beta),
    # KL(r ‖ α r + (1 − α) q) and KL(q ‖ α q + (1 − α) r): DistiLLM, arXiv 2402.03898, section 3.1
    "skew_forward_kl": lambda beta, alpha: Mixture(alpha, 1.0, 0.0),
    "skew_reverse_kl": lambda beta, alpha: Mixture(1 - alpha, 0.0, 1.0),
}


class DivergenceSpec(NamedTuple):
    """The options of :func:`irlfast.ops.token_divergence`. The temperature is in the scales and the soft-caps."""

    rows: Tensor | None  # [N] int64: the hidden row of each result; None where row n has result n
    ref_rows: Tensor | None  # [N] int64, of the reference's hidden states
    ref_share: float
    by_ref: float
    by_policy: float
    logit_scale: float
    logit_softcap: float | None
    ref_logit_scale: float
    ref_logit_softcap: float | None
    top_k: int  # 0: all tokens
    top_k_of: str  # "reference" or "policy"
    tail: bool  # the other tokens count as one
    operands: torch.dtype  # of the products: hidden states and weights of both are cast to it
    buffer_mb: float  # the most memory for logits of both, in MiB

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits and the result: fp32, or fp64 for operands in fp64."""
        return torch.promote_types(self.operands, torch.float32)

    def mixture(self) -> Mixture:
        return Mixture(self.ref_share, self.by_ref, self.by_policy)
