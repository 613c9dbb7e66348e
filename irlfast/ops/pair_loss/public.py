"""Log-ratios and pair losses from hidden states, without the logits of a whole batch.

Dimensions: N response tokens, R hidden rows, S sequences, P pairs, H hidden size, V vocabulary. The log-ratio of a
sequence is ρ(y|x) = Σ_t log π_θ(y_t) − log π_ref(y_t) over its response tokens, the end token included.

Arguments that both operations take:

- ``hidden`` ``[R, H]``, ``weight`` ``[V, H]`` and ``bias`` ``[V]``: fp32, bf16, fp16 or fp64, each of its own dtype.
  Logits are ``softcap(logit_scale · (hidden @ weightᵀ + bias))``, with ``softcap(z) = c · tanh(z / c)`` where
  ``logit_softcap`` is c. The less precise of ``hidden`` and ``weight`` gives the dtype of the product's operands: bf16
  for bf16 and fp32. Under autocast, a tensor counts as one of autocast's dtype, unless it is in fp64. The operands of
  the reference have the policy's dtype. Logits are in fp32 (in fp64 where all operands are), with autocast too, and
  never rounded to bf16; the bias is added to them as it is.
- ``targets`` ``[N]`` int64 or int32: the response tokens of all sequences, one after the other; −100 is skipped.
- ``cu_seqlens`` ``[S + 1]`` int32: sequence s is ``targets[cu_seqlens[s]:cu_seqlens[s + 1]]``; it may be empty.
- ``rows`` ``[N]`` int64 or int32: the hidden row that predicts each target. Prompt rows then cost nothing, and two
  answers to one prompt can share its last row. Default: row n predicts target n, and R = N.
- The values of ``targets``, ``cu_seqlens``, ``rows`` and ``pairs`` are checked on a CPU, and on a GPU where the
  environment has ``IRLFAST_CHECK=1``. Without checks, a target outside the vocabulary has a log-probability of NaN; the
  results for others that point outside are undefined, and PyTorch may stop the process.
- The reference never has gradients. It is one of: nothing; ``ref_hidden`` ``[R, H']``, ``ref_weight`` ``[V, H']`` and
  ``ref_bias`` ``[V]``, with the policy's rows, scale and soft-cap; or ``ref_logps``, log-probabilities per token
  ``[N]`` (as ``token_logps`` of :func:`log_ratio`; exact) or per sequence ``[S]`` (loses ~1e-3 nats at 1,024 tokens).
  A size that is both N and S is read as per token.
- ``token_weights`` ``[N]`` in any floating dtype, without gradient: factors w_t of the tokens' log-ratios. Then
  ρ = Σ_t w_t (log π_θ(y_t) − log π_ref(y_t)), and log-probabilities of sequences are such sums too; those of
  ``ref_logps`` ``[S]`` are taken as they are. Tokens beyond the shorter answer with the weight ``ld_alpha`` are LD-DPO
  (arXiv 2409.06411); 1 / the number of the answer's tokens gives means.
- ``backend``: ``"plain"`` materialises ``[N, V]`` logits and is the oracle; ``"cpu"``, ``"triton"`` and ``"cuda"``
  never do. ``"cuda"`` is the pair slab with our own CUDA C++ between its products, where installation built it.
  ``"auto"`` takes ``"cpu"`` for CPU tensors and ``"triton"`` for others (``"plain"`` in fp64, or without Triton).
  Only ``"plain"`` works inside transformations of torch.func and has forward-mode and second derivatives.
- ``buffer_mb``: the most memory for logits, in MiB (at least one row). ``"plain"`` ignores it.
- ``group``: the process group whose ranks share the vocabulary, as tensor parallelism does. Each rank gives its own
  rows of ``weight``, ``bias``, ``ref_weight`` and ``ref_bias``, in the order of the ranks and any number of them, and
  otherwise the same arguments. Each rank gets the results and the gradient by ``hidden`` of the whole head, and the
  gradients by its own rows. All ranks must call the operation, and its backward.
- A ``DTensor`` (FSDP2, tensor parallelism) is gathered first, and its gradient is the mean over the ranks, as FSDP has
  it. With ``group``, one that is split by rows over this group is used as it is, without gathering.

Each gradient has the dtype of its own tensor. It is summed in fp32 and rounded once: under bf16 autocast, the gradient
of an fp32 weight was never in bf16.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irlfast.ops.common.checks import (
    BACKENDS,
    STATISTICS_BACKENDS,
    check_pairs,
    check_transforms,
    choose_backend,
    require,
    savable,
)
from irlfast.ops.common.dtensors import head_tensors
from irlfast.ops.common.sequences import default_pairs
from irlfast.ops.common.types import HeadInputs, LogRatio, PairFunction, PairLoss, PairLossSpec, ScoredTokens
from irlfast.ops.pair_loss import checks, custom_op, plain, statistics_op
from irlfast.ops.pair_loss.objective import statistics_of


def log_ratio(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S + 1]
    *,
    rows: Tensor | None = None,  # [N]
    ref_hidden: Tensor | None = None,  # [R, H']
    ref_weight: Tensor | None = None,  # [V, H']
    ref_logps: Tensor | None = None,  # [N] or [S]
    token_weights: Tensor | None = None,  # [N]
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: str = "auto",
    buffer_mb: float = 1024,
    group: "torch.distributed.ProcessGroup | None" = None,
    token_statistics: bool = False,
) -> LogRatio:
    """Log-ratio ρ of every sequence. β·ρ is the implicit reward of IRFT (arXiv 2405.17888) and SPIN (arXiv 2401.01335).

    See the module for the arguments. ``log_ratio``, ``policy_logps`` and ``token_logps`` carry gradients to ``hidden``,
    ``weight`` and ``bias``, for any loss that combines them. Passes over ``weight``: one without gradient; two where
    only ``hidden`` needs one (then ``[N, H]`` is kept for the backward); else four, because the backward recomputes.
    :func:`pair_loss` needs three. ``ref_hidden`` takes one more.

    With ``token_statistics``, the result also has the entropy and the log-sum-exp of the policy at each token, from the
    same logits and with gradients: ``token_entropy`` and ``token_lse`` ``[N]``, as :func:`irlfast.ops.token_statistics`
    has them. The backward then always recomputes: three passes where only ``hidden`` needs a gradient, else four.
    ``group`` must be None, and ``backend`` is not ``"cuda"``.

    Returns:
        LogRatio: ``log_ratio``, ``policy_logps``, ``ref_logps`` ``[S]`` and ``token_logps`` ``[N]`` in fp32 (fp64).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names the argument.
        RuntimeError: the backend is not installed.
    """
    hidden, weight, bias = head_tensors(hidden, weight, bias, group)
    ref_hidden, ref_weight, ref_bias = head_tensors(ref_hidden, ref_weight, ref_bias, group, "ref_")
    policy = checks.check_policy(HeadInputs(hidden, weight, bias))
    reference = checks.check_reference(ref_hidden, ref_weight, ref_bias, policy)
    scored = checks.check_scored(policy, targets, cu_seqlens, rows, logit_scale, logit_softcap, buffer_mb, group)
    scored = checks.check_ref_logps(ref_logps, reference is not None, scored)
    scored = checks.check_token_weights(token_weights, scored)
    backends = STATISTICS_BACKENDS if token_statistics else BACKENDS
    backend = choose_backend(backend, hidden, "hidden", backends, scored.operands)
    require(group is None or backend != "plain", "group", group, "None, by backend 'plain'")
    check_transforms(backend, hidden=hidden, weight=weight, bias=bias)
    require(group is None or not token_statistics, "group", group, "None, with token_statistics")
    with torch.autocast(hidden.device.type, enabled=False):
        if token_statistics:
            if backend == "plain":
                token_logps, entropy, lse, ref_token_logps = plain.token_statistics(policy, reference, scored)
            else:
                results = statistics_op.token_statistics(policy, reference, scored, backend)
                token_logps, entropy, lse, ref_token_logps = results
            ratios = statistics_of(token_logps, ref_token_logps, scored)
            return ratios._replace(token_entropy=entropy, token_lse=lse)
        if backend == "plain":
            token_logps, ref_token_logps = plain.token_logps(policy, reference, scored)
        else:
            token_logps, ref_token_logps = custom_op.token_logps(policy, reference, scored, backend)
        return statistics_of(token_logps, ref_token_logps, scored)


def pair_loss(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S + 1]
    *,
    pairs: Tensor | None = None,  # [P, 2]
    beta: float,
    loss_type: str | PairFunction | Sequence[str | PairFunction] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    pair_weights: Tensor | None = None,  # [P]
    token_weights: Tensor | None = None,  # [N]
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    reward_shift: float = 0.0,
    renyi_alpha: float = 0.5,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    nll_weight: float = 0.0,
    num_pairs: float | None = None,
    num_tokens: float | None = None,
    rows: Tensor | None = None,  # [N]
    ref_hidden: Tensor | None = None,  # [R, H']
    ref_weight: Tensor | None = None,  # [V, H']
    ref_logps: Tensor | None = None,  # [N] or [S]
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: str = "auto",
    buffer_mb: float = 1024,
    skip_mass: float = 0.0,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> PairLoss:
    """Loss on pairs (expert y, synthetic ỹ) of their log-ratios. It is −log σ(u), u = β·(ρ(y) − ρ(ỹ)), by default.

    ``loss`` = Σ over pairs of ``pair_weights`` · ``pair_losses`` / ``num_pairs`` + ``nll_weight`` · ``nll_loss``.
    ``nll_loss`` = −Σ log π_θ(y_t) over the experts' tokens / ``num_tokens``, where an expert of several pairs counts
    once, and ``token_weights`` have no effect. The defaults are the pairs and the experts' scored tokens of this call.
    A trainer passes the numbers of its whole batch instead. Without pairs, the loss is 0.

    - ``pairs`` ``[P, 2]`` int64 or int32: sequences (expert, synthetic). A sequence may be in several pairs or in none.
      Default: sequences 2i and 2i + 1.
    - ``loss_type``: a key of :data:`irlfast.ops.pair_loss.losses.PAIR_LOSSES`, which has formulas and sources. Or a
      function of ρ(y) ``[P]``, ρ(ỹ) ``[P]`` and β that returns the loss of each pair ``[P]``. Autograd differentiates
      the function. It must treat each pair by itself (checked on CPU tensors): it is called once per slab, while the
      other pairs' log-ratios are not yet known. Compiled code calls it between two graphs. Or a sequence of these: the
      mixture that ``loss_weights`` weighs (default: 1 each). TRL's ``aot`` and ``aot_unpaired`` sort the log-ratios of
      a batch: they are losses of :func:`log_ratio`.
    - ``label_smoothing``, ``discopop_tau``, ``simpo_gamma``, ``reward_shift``, ``renyi_alpha``: options of some losses.
    - ``f_divergence_type`` (arXiv 2309.16240): the reward that takes the place of ρ, for losses of the margin:
      ``reverse_kl`` ρ, ``forward_kl`` 1 − exp(−ρ), ``js_divergence`` log 2 + log σ(ρ), ``alpha_divergence``
      (exp((α − 1)·ρ) − 1) / (α − 1) with ``f_alpha_divergence_coef`` α.
    - ``pair_weights`` ``[P]`` in any floating dtype, without gradient. T-SPIN (arXiv 2601.08198) is ``sigmoid`` without
      reference on the pairs (expert, synthetic) and (synthetic, first synthetic), with a weight of each kind.

    See the module for the other arguments. Passes over ``weight``: three, or two with a frozen head. A group of
    connected sequences that exceeds ``buffer_mb`` is computed twice (four passes).

    ``skip_mass``, with ``"triton"`` and bf16 operands: leave tiles of the slab that weigh little out of the gradient,
    as CCE does (arXiv 2411.09009). A tile has 64 tokens and 128 rows of ``weight``. It is left out where
    |g_n| · Σ_v |∂ log π(y_n) / ∂ z_v| is at most ``skip_mass`` · max_n |g_n| for every token n of the tile, g being the
    loss's derivative by log π. Each token then adds an error of at most ``skip_mass`` · max |g| · V / 128 ·
    ``logit_scale`` · max_v ‖W_v‖ to the gradient of its hidden row. If a share s of the tiles is kept, that makes
    1 + 2s passes; ``python -m benchmarks.skipping`` measures s. With 0, and with other backends and dtypes, nothing is
    left out.

    Returns:
        PairLoss: ``loss`` ``[]``, differentiable in ``hidden``, ``weight``, ``bias``; and, without gradient,
        ``log_ratio``, ``policy_logps``, ``ref_logps`` ``[S]``, ``nll_loss`` ``[]`` and ``pair_losses`` ``[P]``; in fp32
        (fp64).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names the argument.
        RuntimeError: the backend is not installed.
    """
    hidden, weight, bias = head_tensors(hidden, weight, bias, group)
    ref_hidden, ref_weight, ref_bias = head_tensors(ref_hidden, ref_weight, ref_bias, group, "ref_")
    policy = checks.check_policy(HeadInputs(hidden, weight, bias))
    reference = checks.check_reference(ref_hidden, ref_weight, ref_bias, policy)
    scored = checks.check_scored(
        policy, targets, cu_seqlens, rows, logit_scale, logit_softcap, buffer_mb, group, skip_mass
    )
    scored = checks.check_ref_logps(ref_logps, reference is not None, scored)
    scored = checks.check_token_weights(token_weights, scored)
    check_pairs(pairs, cu_seqlens)
    loss_types = (loss_type,) if isinstance(loss_type, str) or callable(loss_type) else tuple(loss_type)
    weights = (1.0,) * len(loss_types) if loss_weights is None else tuple(loss_weights)
    pairs = default_pairs(scored.num_sequences, hidden.device) if pairs is None else savable(pairs.long())
    options = label_smoothing, discopop_tau, simpo_gamma, reward_shift, renyi_alpha
    divergence = f_divergence_type, f_alpha_divergence_coef
    counts = num_pairs, num_tokens
    spec = PairLossSpec(pairs, beta, loss_types, weights, pair_weights, nll_weight, *counts, *options, *divergence)
    spec = checks.check_spec(spec, scored, has_reference=ref_hidden is not None or ref_logps is not None)
    backend = choose_backend(backend, hidden, "hidden", dtype=scored.operands)
    require(group is None or backend != "plain", "group", group, "None, by backend 'plain'")
    check_transforms(backend, hidden=hidden, weight=weight, bias=bias)
    arguments = policy, reference, scored, spec, backend
    with torch.autocast(hidden.device.type, enabled=False):
        result = compute_pair_loss(*arguments) if spec.is_named() else compute_untraced(*arguments)
    return PairLoss(result.loss, *(statistic.detach() for statistic in result[1:]))


def compute_pair_loss(
    policy: HeadInputs, reference: HeadInputs | None, scored: ScoredTokens, spec: PairLossSpec, backend: str
) -> PairLoss:
    if backend == "plain":
        return plain.pair_loss(policy, reference, scored, spec)
    return custom_op.pair_loss(policy, reference, scored, spec, backend)


def compute_untraced(*arguments: Any) -> PairLoss:
    from irlfast.ops.pair_loss.untraced import untraced

    result: PairLoss = untraced(compute_pair_loss, *arguments)
    return result
