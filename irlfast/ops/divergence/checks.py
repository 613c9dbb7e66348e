"""Checks of the arguments of ``token_divergence``, which become :class:`HeadInputs` and :class:`DivergenceSpec`."""

import math
from numbers import Real
from typing import Any

from torch import Tensor

from irlfast.ops.common.checks import (
    INTEGERS,
    alternatives,
    check_positive,
    check_range,
    check_scaling,
    check_tensor,
    require,
    savable,
)
from irlfast.ops.common.types import HeadInputs
from irlfast.ops.divergence.mixtures import DIVERGENCES, Mixture
from irlfast.ops.pair_loss.checks import check_head_inputs, savable_head


def check_reference(reference: HeadInputs, policy: HeadInputs) -> HeadInputs:
    """The reference, detached."""
    check_head_inputs(reference, "ref_", policy.hidden.device)
    vocabulary = policy.weight.shape[0]
    fits = reference.weight.shape[0] == vocabulary
    require(fits, "ref_weight", reference.weight, "{} rows, as weight has", vocabulary)
    hidden, weight, bias = reference
    return savable_head(HeadInputs(hidden.detach(), weight.detach(), None if bias is None else bias.detach()))


def check_rows(
    rows: Tensor | None, ref_rows: Tensor | None, policy: HeadInputs, reference: HeadInputs
) -> tuple[Tensor | None, Tensor | None]:
    """``rows`` and ``ref_rows`` as int64; None where row n of the hidden states has result n."""
    ref_rows = rows if ref_rows is None else ref_rows
    count = check_indices(rows, "rows", policy.hidden, "hidden")
    ref_count = check_indices(ref_rows, "ref_rows", reference.hidden, "ref_hidden")
    name, chosen = ("ref_hidden", reference.hidden) if ref_rows is None else ("ref_rows", ref_rows)
    require(ref_count == count, name, chosen, "{} rows, as the policy has", count)
    rows, ref_rows = (None if chosen is None else savable(chosen.long()) for chosen in (rows, ref_rows))
    return rows, ref_rows


def check_indices(rows: Tensor | None, name: str, hidden: Tensor, of: str) -> int:
    """Return the number of rows that are chosen."""
    if rows is None:
        return hidden.shape[0]
    check_tensor(rows, name, "[N]", INTEGERS, hidden.device)
    check_range(rows, name, 0, hidden.shape[0], f", the rows of {of}")
    return rows.shape[0]


def check_mixture(kind: Any, beta: Any, alpha: Any) -> Mixture:
    require(isinstance(kind, str) and kind in DIVERGENCES, "kind", kind, alternatives(DIVERGENCES))
    shares: dict[str, Any] = {"beta": beta, "alpha": alpha}
    for name, value in shares.items():
        number = isinstance(value, Real)
        require(number and 0 < value < 1, name, value, "a number > 0 and < 1 (for an end, see the kinds)")
    return DIVERGENCES[kind](float(beta), float(alpha))


def check_softmax(
    scale: float, softcap: float | None, ref_scale: float | None, ref_softcap: float | None, temperature: float
) -> tuple[float, float | None, float, float | None]:
    """Scales and soft-caps of policy and reference, divided by the temperature.

    ``c · tanh(z / c) / T`` is ``(c / T) · tanh((z / T) / (c / T))``.
    """
    check_positive(temperature, "temperature")
    check_scaling(scale, softcap)
    ref_scale = scale if ref_scale is None else ref_scale
    ref_softcap = softcap if ref_softcap is None else None if ref_softcap == math.inf else ref_softcap
    check_scaling(ref_scale, ref_softcap, "ref_")
    cap, ref_cap = (None if cap is None else cap / temperature for cap in (softcap, ref_softcap))
    return scale / temperature, cap, ref_scale / temperature, ref_cap


def check_top_k(top_k: Any, top_k_of: Any, vocabulary: int) -> int:
    """The number of top tokens, or 0 where these are all tokens."""
    require(top_k_of in ("reference", "policy"), "top_k_of", top_k_of, "'reference' or 'policy'")
    if top_k is None:
        return 0
    fits = isinstance(top_k, int) and not isinstance(top_k, bool) and top_k > 0
    require(fits, "top_k", top_k, "None or a number of tokens > 0")
    return top_k if top_k < vocabulary else 0
