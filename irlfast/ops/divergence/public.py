"""Divergences between two distributions over the vocabulary, from hidden states, without ``[N, V]`` logits."""

import torch
from torch import Tensor

from irlfast.ops.common.checks import check_positive, check_transforms, choose_backend
from irlfast.ops.common.dtensors import head_tensors
from irlfast.ops.common.precision import dtype_of_products
from irlfast.ops.common.types import HeadInputs
from irlfast.ops.divergence import checks, custom_op, plain
from irlfast.ops.divergence.mixtures import DivergenceSpec
from irlfast.ops.pair_loss.checks import check_policy

BACKENDS = ("auto", "plain", "cpu", "triton")


def token_divergence(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    *,
    ref_hidden: Tensor,  # [R', H']
    ref_weight: Tensor,  # [V, H']
    kind: str,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_k_of: str = "reference",
    tail: bool = True,
    rows: Tensor | None = None,  # [N]
    ref_rows: Tensor | None = None,  # [N]
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_logit_softcap: float | None = None,
    backend: str = "auto",
    buffer_mb: float = 1024,
) -> Tensor:
    """Divergence between the next-token distributions of a policy q and of a reference (or teacher) r, for N rows.

    ``kind``, where KL(p ‖ m) = Σ_v p_v log(p_v / m_v) over the whole vocabulary:

    - ``forward_kl``: KL(r ‖ q). TRL's GKD and SDFT, and Liger, have it at 0.
    - ``reverse_kl``: KL(q ‖ r). They have it at 1.
    - ``jensen_shannon``: β KL(r ‖ m) + (1 − β) KL(q ‖ m) with m = β r + (1 − β) q, ``beta`` β: the generalised JSD of
      GKD (arXiv 2306.13649, eq. 1), with TRL's and Liger's β between 0 and 1. Unlike theirs, it does not jump at the
      ends: β → 0 gives β · KL(r ‖ q).
    - ``skew_forward_kl``: KL(r ‖ α r + (1 − α) q), and ``skew_reverse_kl``: KL(q ‖ α q + (1 − α) r), ``alpha`` α
      (DistiLLM, arXiv 2402.03898, section 3.1).

    Both softmaxes have the ``temperature``; the result is not multiplied by its square.

    ``top_k`` replaces the vocabulary by the k most probable tokens of the reference, or of the policy
    (``top_k_of="policy"``, as self-distillation does: SDFT and SDPO, arXiv 2601.20802). All others count as one more
    token (``tail=True``: never more than the full divergence), or are left out, and the k are renormalised
    (``tail=False``, TRL's default). Which tokens are in the k has no gradient.

    Other arguments:

    - ``hidden``, ``weight``, ``bias``: logits are ``softcap(logit_scale · (hidden @ weightᵀ + bias))``, with dtypes as
      for :func:`irlfast.ops.pair_loss`. The reference has its own, which may have another hidden size, and never has
      gradients; ``ref_logit_scale`` and ``ref_logit_softcap`` are the policy's by default, and a soft-cap of
      ``math.inf`` is none.
    - ``rows`` and ``ref_rows`` ``[N]`` int64 or int32: result n is between ``hidden[rows[n]]`` and
      ``ref_hidden[ref_rows[n]]``. Default: ``ref_rows`` is ``rows``, and N = R without either. A teacher that reads a
      longer prompt has rows of its own.
    - A ``DTensor`` is gathered first, as by :func:`irlfast.ops.pair_loss`.
    - ``backend``: ``"plain"`` materialises ``[N, V]`` logits and is the oracle; ``"cpu"`` and ``"triton"`` never do.
      Only ``"plain"`` works inside transformations of torch.func and has forward-mode and second derivatives.
    - ``buffer_mb``: the most memory for the logits of both, in MiB (at least one row of each).

    Passes over the weights, where ``backend`` is not ``"plain"``: two without gradient, one of each; three where only
    ``hidden`` needs one (then ``[N, H]`` is kept for the backward); else six, because the backward computes both again.

    Returns:
        Tensor: ``[N]`` fp32 (fp64) in nats, differentiable in ``hidden``, ``weight`` and ``bias``. It is 0 where the
        logits of both are equal.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names the argument.
        RuntimeError: the backend is not installed.
    """
    policy = check_policy(HeadInputs(*head_tensors(hidden, weight, bias)))
    reference = checks.check_reference(
        HeadInputs(*head_tensors(ref_hidden, ref_weight, ref_bias, prefix="ref_")), policy
    )
    check_positive(buffer_mb, "buffer_mb")
    softmax = checks.check_softmax(logit_scale, logit_softcap, ref_logit_scale, ref_logit_softcap, temperature)
    spec = DivergenceSpec(
        *checks.check_rows(rows, ref_rows, policy, reference),
        *checks.check_mixture(kind, beta, alpha),
        *softmax,
        checks.check_top_k(top_k, top_k_of, policy.weight.shape[0]),
        top_k_of,
        tail,
        dtype_of_products(policy.hidden, policy.weight),
        buffer_mb,
    )
    backend = choose_backend(backend, policy.hidden, "hidden", BACKENDS, spec.operands)
    check_transforms(backend, **policy._asdict())
    with torch.autocast(policy.hidden.device.type, enabled=False):
        if backend == "plain":
            return plain.token_divergence(policy, reference, spec)
        return custom_op.token_divergence(policy, reference, spec, backend)
