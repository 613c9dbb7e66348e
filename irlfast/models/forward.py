"""The forward pass of a packed batch: hidden states under the head, with the mask that the model's attention takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irlfast.data.packing import Batch
from irlfast.models import varlen
from irlfast.models.masks import masks
from irlfast.ops.common.heads import body_of, unwrapped


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Return the last hidden states ``[B*L, H]`` of a packed batch, after the final norm."""
    return body_output(model, batch).last_hidden_state.flatten(0, 1)


def states_at(model: Any, batch: Batch, depths: Sequence[float]) -> Tensor:
    """Return the hidden states ``[B*L, k, H]`` of a packed batch at k depths: 0 is the embedding, 1 the last layer."""
    states = body_output(model, batch, output_hidden_states=True).hidden_states
    chosen = [states[round(depth * (len(states) - 1))] for depth in depths]
    return torch.stack(chosen, 2).flatten(0, 1)


def body_output(model: Any, batch: Batch, **options: Any) -> Any:
    """Return what the body of a model (all but its head) returns for a packed batch."""
    base = unwrapped(model)
    return body_of(base)(input_ids=batch.input_ids, use_cache=False, **attention_inputs(base, batch), **options)


def attention_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Return the arguments that tell ``model`` each token's position, and the tokens that each token attends to."""
    if takes_cu_seqlens(model):
        return {
            "position_ids": batch.position_ids,
            "cu_seq_lens_q": batch.starts,
            "cu_seq_lens_k": batch.starts,
            "max_length_q": batch.longest,
            "max_length_k": batch.longest,
        }
    return {} if batch.causal else {"position_ids": batch.position_ids, "attention_mask": masks(model, batch)}


def attention_of(model: Any) -> str:
    """Return Transformers' name of the attention that a model runs now."""
    return model.config.get_text_config()._attn_implementation


def takes_cu_seqlens(model: Any) -> bool:
    """Return whether a model's attention takes the start of each sequence. Answers cannot share a prompt then."""
    return "flash" in attention_of(model) or attention_of(model) == varlen.NAME
