"""torch's own attention for rows of several sequences (torch.nn.attention.varlen), for Transformers' models.

It runs flash attention's kernels where flash-attn is not installed. Rows need no padding, and no sequence attends to
another.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from irlfast.models.configs import attention_head_size

NAME = "varlen"


def register(model: Any) -> bool:
    """Register this attention with Transformers if a GPU can run ``model`` with it; return whether it can.

    That needs 16-bit weights, scores without a soft-cap, a head size that flash attention's kernels take, compute
    capability 8.0, and a torch whose varlen attention has a scale and windows.
    """
    from transformers import AttentionInterface

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    new_torch = inspect.signature(varlen_attn).parameters.keys() >= {"scale", "window_size", "enable_gqa"}
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    head_size = attention_head_size(model)
    old_gpu = model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (8, 0)
    sixteen_bits = model.dtype in (torch.bfloat16, torch.float16)
    if not new_torch or softcap is not None or head_size % 8 or head_size > 256 or old_gpu or not sixteen_bits:
        return False
    AttentionInterface.register(NAME, attention)  # and no mask function: it needs none
    return True


def attention(
    module: Any,
    query: Tensor,  # [B, heads, L, D]
    key: Tensor,  # [B, key heads, L, D]; several query heads may share a key head
    value: Tensor,  # as key
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,  # [sequences + 1] int32, where each sequence begins in the B * L tokens, and their end
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return causal attention ``[B, L, heads, D]`` within each sequence, as a layer of Transformers calls it.

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
