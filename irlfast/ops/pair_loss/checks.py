"""Checks of the arguments of ``log_ratio`` and ``pair_loss``, which become the records of ``common/types.py``."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from irlfast.ops.common.checks import (
    FLOATS,
    INTEGERS,
    alternatives,
    check_cached,
    check_cu_seqlens,
    check_offsets,
    check_positive,
    check_range,
    check_scaling,
    check_targets,
    check_tensor,
    device_of,
    is_traced,
    require,
    savable,
)
from irlfast.ops.common.precision import dtype_of_products
from irlfast.ops.common.sequences import sequence_ids
from irlfast.ops.common.types import IGNORE, HeadInputs, PairLossSpec, ScoredTokens
from irlfast.ops.pair_loss.divergences import F_DIVERGENCES
from irlfast.ops.pair_loss.losses import PAIR_LOSSES

SORTED = ("aot", "aot_unpaired")  # TRL's losses that sort log-ratios of the whole batch
BOUNDS = {
    "label_smoothing": (0.0, 0.49, "a number from 0 to 0.49"),
    "discopop_tau": (1e-6, math.inf, "a number >= 1e-6"),
    "simpo_gamma": (-80.0, 80.0, "a number from -80 to 80"),
    "reward_shift": (-80.0, 80.0, "a number from -80 to 80"),
    "renyi_alpha": (-80.0, 80.0, "a number from -80 to 80"),
}

# What is expected, as text that torch.compile need not put together
LOSSES = f"{alternatives(PAIR_LOSSES)}, or a function"
DIVERGENCES = alternatives(F_DIVERGENCES)
REVERSE_KL = "'reverse_kl' where loss_type is not " + alternatives(
    name for name, kind in PAIR_LOSSES.items() if kind.of_margin
)
DEFAULT = {
    option: "the default where loss_type is not "
    + alternatives(name for name, kind in PAIR_LOSSES.items() if option in kind.options)
    for option in BOUNDS
}


def check_policy(policy: HeadInputs) -> HeadInputs:
    check_head_inputs(policy, "", device_of(policy.hidden, "hidden"))
    return savable_head(policy)


def savable_head(inputs: HeadInputs) -> HeadInputs:
    hidden, weight, bias = inputs
    return HeadInputs(savable(hidden), savable(weight), None if bias is None else savable(bias))


def check_reference(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, policy: HeadInputs
) -> HeadInputs | None:
    """The reference that is computed from hidden states, detached; None without ``ref_hidden``."""
    if hidden is None:
        require(weight is None, "ref_weight", weight, "None where ref_hidden is None")
        require(bias is None, "ref_bias", bias, "None where ref_hidden is None")
        return None
    if weight is None:
        raise ValueError("ref_weight: found None, expected a tensor [V, H'] where ref_hidden is given")
    check_head_inputs(HeadInputs(hidden, weight, bias), "ref_", policy.hidden.device)
    rows, vocabulary = policy.hidden.shape[0], policy.weight.shape[0]
    require(hidden.shape[0] == rows, "ref_hidden", hidden, "{} rows, as hidden has", rows)
    require(weight.shape[0] == vocabulary, "ref_weight", weight, "{} rows, as weight has", vocabulary)
    return HeadInputs(hidden.detach(), weight.detach(), None if bias is None else bias.detach())


def check_head_inputs(inputs: HeadInputs, prefix: str, device: torch.device) -> None:
    hidden, weight, bias = inputs
    check_tensor(hidden, f"{prefix}hidden", "[R, H]", FLOATS, device)
    check_tensor(weight, f"{prefix}weight", "[V, H]", FLOATS, device)
    size, columns = weight.shape[0], hidden.shape[1]
    fits = size > 0 and weight.shape[1] == columns
    require(fits, f"{prefix}weight", weight, f"[V, {{}}] with V > 0, as {prefix}hidden has H columns", columns)
    if bias is not None:
        check_tensor(bias, f"{prefix}bias", "[V]", FLOATS, device)
        require(bias.shape[0] == size, f"{prefix}bias", bias, f"[{{}}], as {prefix}weight has that many rows", size)


def check_scored(
    policy: HeadInputs,
    targets: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    buffer_mb: float,
    group: Any = None,
    skip_mass: float = 0.0,
) -> ScoredTokens:
    """The scored tokens, with ``cu_seqlens`` turned into the sequence of each target."""
    hidden, device = policy.hidden, policy.hidden.device
    check_tensor(targets, "targets", "[N]", INTEGERS, device)
    check_offsets(cu_seqlens, device)
    tokens = targets.numel()
    if rows is None:
        require(hidden.shape[0] == tokens, "hidden", hidden, "{} rows, as targets, where rows is None", tokens)
    else:
        check_tensor(rows, "rows", "[N]", INTEGERS, device)
        require(rows.numel() == tokens, "rows", rows, "[{}], as targets", tokens)
    check_scaling(logit_scale, logit_softcap)
    check_positive(buffer_mb, "buffer_mb")
    number = isinstance(skip_mass, Real)
    require(number and 0 <= skip_mass < 1, "skip_mass", skip_mass, "a number >= 0 and < 1")
    check_cu_seqlens(cu_seqlens, tokens, "the number of targets")
    first, widest, vocabulary = 0, 0, policy.weight.shape[0]
    if group is not None:
        from irlfast.ops.pair_loss.sharded import vocabulary_of  # imports torch._dynamo, and so Triton

        require(skip_mass == 0, "skip_mass", skip_mass, "0 where group is given")
        first, widest, vocabulary = vocabulary_of(group, policy.weight, targets)
    check_targets(targets, vocabulary)
    if rows is not None:
        check_range(rows, "rows", 0, hidden.shape[0], ", the rows of hidden")
    return ScoredTokens(
        targets=savable(targets.long()),
        rows=None if rows is None else savable(rows.long()),
        sequence_ids=sequence_ids(cu_seqlens, tokens),
        num_sequences=cu_seqlens.numel() - 1,
        logit_scale=float(logit_scale),
        logit_softcap=logit_softcap,
        operands=dtype_of_products(hidden, policy.weight),
        buffer_mb=buffer_mb,
        skip_mass=skip_mass,
        group=None if group is None else group.group_name,
        first_token=first,
        widest_shard=widest,
    )


def check_ref_logps(ref_logps: Tensor | None, has_ref_hidden: bool, scored: ScoredTokens) -> ScoredTokens:
    """The scored tokens with their cached reference, per token ``[N]`` or per sequence ``[S]``, detached."""
    if ref_logps is None:
        return scored
    require(not has_ref_hidden, "ref_logps", ref_logps, "None where ref_hidden is given (one reference, not two)")
    check_cached(ref_logps, scored.targets.device, scored.targets.shape[0], scored.num_sequences)
    return scored._replace(ref_logps=ref_logps.detach())


def check_token_weights(token_weights: Tensor | None, scored: ScoredTokens) -> ScoredTokens:
    """The scored tokens with factors of their log-ratios, detached, and 0 where skipped."""
    if token_weights is None:
        return scored
    targets = scored.targets
    check_tensor(token_weights, "token_weights", "[N]", FLOATS, targets.device)
    fits = token_weights.shape == targets.shape
    require(fits, "token_weights", token_weights, "[{}], as targets", targets.shape[0])
    weights = token_weights.detach().to(scored.dtype)
    return scored._replace(token_weights=torch.where(targets == IGNORE, 0, weights))


# ---------------------------------------------------------------- the loss on pairs


def check_spec(spec: PairLossSpec, scored: ScoredTokens, has_reference: bool) -> PairLossSpec:
    """The loss on pairs, with the weights of the pairs detached and in the dtype of the statistics."""
    check_positive(spec.beta, "beta")
    check_loss_types(spec, has_reference)
    runs = spec.is_named() or not is_traced(scored.targets)
    require(runs, "loss_type", "a function", "a name for fake tensors and inside a transformation of torch.func")
    check_options(spec)
    fits = isinstance(spec.nll_weight, Real) and 0 <= spec.nll_weight < math.inf
    require(fits, "nll_weight", spec.nll_weight, "a number >= 0")
    counts: dict[str, Any] = {"num_pairs": spec.num_pairs, "num_tokens": spec.num_tokens}
    for name, value in counts.items():
        if value is not None:
            check_positive(value, name, "None or a number > 0")
    if spec.pair_weights is None:
        return spec
    check_tensor(spec.pair_weights, "pair_weights", "[P]", FLOATS, scored.targets.device)
    fits = spec.pair_weights.shape[0] == spec.pairs.shape[0]
    require(fits, "pair_weights", spec.pair_weights, "[{}], one per pair", spec.pairs.shape[0])
    return spec._replace(pair_weights=spec.pair_weights.detach().to(scored.dtype))


def check_loss_types(spec: PairLossSpec, has_reference: bool) -> None:
    require(len(spec.loss_types) > 0, "loss_type", "none", "at least one")
    for loss_type in spec.loss_types:
        if isinstance(loss_type, str):
            require(loss_type not in SORTED, "loss_type", loss_type, "a loss per pair; this one sorts all log_ratios")
            require(loss_type in PAIR_LOSSES, "loss_type", loss_type, LOSSES)
            unused = has_reference and PAIR_LOSSES[loss_type].without_reference
            require(not unused, "loss_type", loss_type, "no reference, by this loss")
        else:
            require(callable(loss_type), "loss_type", loss_type, "the name of a loss, or a function")
    fits = len(spec.loss_weights) == len(spec.loss_types)
    require(fits, "loss_weights", f"{len(spec.loss_weights)} numbers", f"{len(spec.loss_types)}, one per loss type")
    for weight in spec.loss_weights:
        require(isinstance(weight, Real) and -math.inf < weight < math.inf, "loss_weights", weight, "numbers")


def check_options(spec: PairLossSpec) -> None:
    kinds = [PAIR_LOSSES[loss_type] for loss_type in spec.loss_types if isinstance(loss_type, str)]
    for option, (low, high, expected) in BOUNDS.items():
        value: Any = getattr(spec, option)
        number = isinstance(value, Real)
        require(number and low <= value <= high, option, value, expected)
        used = any(option in kind.options for kind in kinds) or value == PairLossSpec._field_defaults[option]
        require(used, option, value, DEFAULT[option])
    if "exo_pair" in spec.loss_types:
        check_positive(spec.label_smoothing, "label_smoothing", "a number > 0 where loss_type is 'exo_pair'")
    require(spec.f_divergence_type in F_DIVERGENCES, "f_divergence_type", spec.f_divergence_type, DIVERGENCES)
    alpha: Any = spec.f_alpha_divergence_coef
    number = isinstance(alpha, Real)
    require(number and -80 <= alpha <= 80, "f_alpha_divergence_coef", alpha, "a number from -80 to 80")
    margins = len(kinds) == len(spec.loss_types) and all(kind.of_margin for kind in kinds)
    applies = margins or spec.f_divergence_type == "reverse_kl"
    require(applies, "f_divergence_type", spec.f_divergence_type, REVERSE_KL)
