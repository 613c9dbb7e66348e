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
    policy = sum_per_sequence(token_logps, ids, sequences, weights)
    if ref_logps is None:
        reference, ratio = torch.zeros_like(policy), policy
    elif ref_logps.numel() == targets.numel():  # also where N = S: the trainer caches per token
        ref_logps = torch.where(targets == IGNORE, 0, ref_logps.to(token_logps.dtype))
        reference = sum_per_sequence(ref_logps, ids, sequences, weights)
        ratio = sum_per_sequence(token_logps - ref_logps, ids, sequences, weights)
    else:  # round the policy's sum as the reference's was rounded: equal models then have log-ratios of exactly 0
        rounded = policy.to(torch.promote_types(ref_logps.dtype, token_logps.dtype))
        reference, ratio = ref_logps.double(), rounded.double() - ref_logps
    dtype = token_logps.dtype
    return LogRatio(ratio.to(dtype), policy.to(dtype), reference.to(dtype), token_logps)


def sum_per_sequence(values: Tensor, ids: Tensor, sequences: int, weights: Tensor | None) -> Tensor:
    """Sums ``[S]`` of values per token ``[N]`` in fp64: a thousand fp32 additions near 3,000 nats lose 1e-3."""
    values = values.double() if weights is None else values.double() * weights
    return values.new_zeros(sequences, dtype=torch.float64).index_add(0, ids, values)
