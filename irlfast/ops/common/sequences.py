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
    """Statistics of the sequences, in the dtype of ``token_logps``: sums of values per token times ``weights``.

    Policy and reference are subtracted per token, before the sum. The differences are small, so the sum loses nothing.
    """
    dtype = token_logps.dtype
    policy = sum_per_sequence(token_logps, ids, sequences, weights)
    if ref_logps is None:
        ratio, reference = policy, torch.zeros_like(policy)
    elif ref_logps.numel() == targets.numel():  # also where N = S: the trainer caches per token
        cached = known(ref_logps, targets, dtype)
        ratio = sum_per_sequence(token_logps - cached, ids, sequences, weights)
        reference = sum_per_sequence(cached, ids, sequences, weights)
    else:
        ratio, reference = minus_cached(policy, ref_logps, dtype), ref_logps
    return LogRatio(ratio.to(dtype), policy.to(dtype), reference.to(dtype), token_logps)


def summed_log_ratio(
    token_logps: Tensor,  # [N] or, without ``ref_logps``, the differences from the reference's
    ref_logps: Tensor | None,  # [S]
    ids: Tensor,
    sequences: int,
    weights: Tensor | None = None,
) -> Tensor:
    """The log-ratios ``[S]``, where the reference is cached per sequence, or subtracted already."""
    dtype = token_logps.dtype
    policy = sum_per_sequence(token_logps, ids, sequences, weights)
    return (policy if ref_logps is None else minus_cached(policy, ref_logps, dtype)).to(dtype)


def minus_cached(policy: Tensor, ref_logps: Tensor, dtype: torch.dtype) -> Tensor:
    """The policy's sums ``[S]`` in fp64 minus the reference's, in fp64.

    The policy's are rounded as the reference's were: equal models then have log-ratios of exactly 0.
    """
    return policy.to(torch.promote_types(ref_logps.dtype, dtype)).double() - ref_logps


def known(ref_logps: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Cached log-probabilities ``[N]``, 0 where the target is skipped."""
    return torch.where(targets == IGNORE, 0, ref_logps.to(dtype))


def sum_per_sequence(values: Tensor, ids: Tensor, sequences: int, weights: Tensor | None) -> Tensor:
    """Sums ``[S]`` of values per token ``[N]`` in fp64: a thousand fp32 additions near 3,000 nats lose 1e-3."""
    values = values.double() if weights is None else values.double() * weights
    return values.new_zeros(sequences, dtype=torch.float64).index_add(0, ids, values)
