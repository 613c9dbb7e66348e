"""torch's own attention over rows of several sequences (torch.nn.attention.varlen), for Transformers' models.

Flash attention's kernels where flash-attn is not installed: no row is padded, and no sequence sees another.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from irlfast.models.load import head_size

NAME = "varlen"


def offer(model: Any) -> bool:
    """Make it known to Transformers if a GPU can run it for ``model``; returns whether.

    That takes 16-bit weights, scores without a soft-cap, heads that flash attention's kernels take, sm_80, and a torch
    whose varlen has a scale and windows.
    """
    from transformers import AttentionInterface

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    has = inspect.signature(varlen_attn).parameters.keys() >= {"scale", "window_size", "enable_gqa"}
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    takes = head_size(model) % 8 == 0 and head_size(model) <= 256
    old = model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (8, 0)
    if not has or capped is not None or not takes or old or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    AttentionInterface.register(NAME, attention)  # and no mask: it needs none
    return True


def attention(
    module: Any,
    query: Tensor,  # [B, heads, L, D]
    key: Tensor,  # [B, heads that several queries' heads may share, L, D]
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,  # [sequences + 1] int32, where they begin in the B * L tokens
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer calls: causal attention ``[B, L, heads, D]`` within each sequence.

    Raises:
        ValueError: the layer wants soft-capped scores or attention sinks.
    """
    from torch.nn.attention import varlen

    if unknown := [name for name in ("softcap", "s_aux") if others.get(name) is not None]:
        raise ValueError(f"attn_implementation: {NAME} has no {', '.join(unknown)}; expected sdpa or flex_attention")
    rows, length = query.shape[0], query.shape[2]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    attended: Any = varlen.varlen_attn(
        query,
        key,
        value,
        cu_seq_q=cu_seq_lens_q,
        cu_seq_k=cu_seq_lens_q,
        max_q=max_length_q,
        max_k=max_length_q,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),  # tokens before and after
        enable_gqa=True,
    )
    return attended.unflatten(0, (rows, length)), None
