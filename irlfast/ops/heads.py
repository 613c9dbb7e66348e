"""The LM head of a Transformers model as the operations take it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """What turns a hidden row into logits: ``softcap(scale * (hidden @ weight.T + bias))``."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    logit_softcap: float | None


def lm_head(model: Any) -> Head:
    """The LM head of a causal Transformers model, with its family's logit scale and soft-cap.

    Raises:
        ValueError: it is not a ``torch.nn.Linear``.
    """
    output = model.get_output_embeddings()
    if not isinstance(output, torch.nn.Linear):
        raise ValueError(f"{type(model).__name__}: found LM head {type(output).__name__}, expected torch.nn.Linear")
    scale = getattr(model.config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(model.config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(model.config, "final_logit_softcapping", None)  # Gemma
    return Head(output.weight, output.bias, scale, softcap)
