"""Sequences of tokens: their ids, their default pairs, and their log-ratios from log-probabilities per token."""

import torch
from torch import Tensor

from irlfast.ops.common.types import IGNORE, LogRatio


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The number ``[N]`` of the sequence that each of N ``tokens`` belongs to."""
    numbers = torch.arange(cu_seqlens.numel() - 1, dtype=torch.int64, device=cu_seqlens.device)
    return numbers.repeat_interleave(cu_seqlens.diff(), output_size=tokens)


def default_pairs(sequences: int, device: torch.device) -> Tensor:
    """``[P, 2]``: sequences 2i (expert) and 2i + 1 (synthetic)."""
    return torch.arange(sequences, dtype=torch.int64, device=device).view(-1, 2)


def log_ratios(
    token_logps: Tensor,  # [N] the policy's, 0 where skipped
    ref_logps: Tensor | None,  # [N] or [S]
    targets: Tensor,  # [N]
    ids: Tensor,  # [N]
    sequences: int,  # S
    weights: Tensor | None = None,  # [N] 0 where skipped
) -> LogRatio:
    """Statistics of the sequences, in the dtype of ``token_logps``: sums of values per token times ``weights``."""
    policy = sum_per_sequence(token_logps, ids, sequences, weights)
    ratio = sequence_log_ratio(token_logps, ref_logps, targets, ids, sequences, weights)
    if ref_logps is None:
        reference = torch.zeros_like(policy)
    elif ref_logps.numel() == targets.numel():
        reference = sum_per_sequence(known(ref_logps, targets, token_logps.dtype), ids, sequences, weights)
    else:
        reference = ref_logps
    dtype = token_logps.dtype
    return LogRatio(ratio, policy.to(dtype), reference.to(dtype), token_logps)


def sequence_log_ratio(
    token_logps: Tensor,
    ref_logps: Tensor | None,
    targets: Tensor,
    ids: Tensor,
    sequences: int,
    weights: Tensor | None = None,
) -> Tensor:
    """The log-ratios ``[S]`` alone, of the arguments of :func:`log_ratios`.

    Policy and reference are subtracted per token, before the sum. The differences are small, so the sum loses nothing.
    """
    if ref_logps is not None and ref_logps.numel() == targets.numel():  # also where N = S: the trainer caches per token
        token_logps = token_logps - known(ref_logps, targets, token_logps.dtype)
        ref_logps = None
    return summed_log_ratio(token_logps, ref_logps, ids, sequences, weights)


def summed_log_ratio(
    token_logps: Tensor,  # [N] or, without ``ref_logps``, the differences from the reference's
    ref_logps: Tensor | None,  # [S]
    ids: Tensor,
    sequences: int,
    weights: Tensor | None = None,
) -> Tensor:
    """The log-ratios ``[S]``, where the reference is cached per sequence, or subtracted already."""
    dtype = token_logps.dtype
    if ref_logps is None:
        return sum_per_sequence(token_logps, ids, sequences, weights).to(dtype)
    # Round the policy's sum as the reference's was rounded: equal models then have log-ratios of exactly 0.
    rounded = sum_per_sequence(token_logps, ids, sequences, weights).to(torch.promote_types(ref_logps.dtype, dtype))
    return (rounded.double() - ref_logps).to(dtype)


def known(ref_logps: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Cached log-probabilities ``[N]``, 0 where the target is skipped."""
    return torch.where(targets == IGNORE, 0, ref_logps.to(dtype))


def sum_per_sequence(values: Tensor, ids: Tensor, sequences: int, weights: Tensor | None) -> Tensor:
    """Sums ``[S]`` of values per token ``[N]`` in fp64: a thousand fp32 additions near 3,000 nats lose 1e-3."""
    values = values.double() if weights is None else values.double() * weights
    return values.new_zeros(sequences, dtype=torch.float64).index_add(0, ids, values)
