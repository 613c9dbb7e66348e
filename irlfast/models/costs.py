"""Operations of a training step, counted from the sizes of a model's weights."""

import math
from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor

from irlfast.models.split import size_of


class Costs(NamedTuple):
    """Operations of the forward and backward pass. No recomputation is counted.

    A weight takes two operations per token forward, two for the gradient by its input, and two for the gradient by
    itself if it is trained.
    """

    token: int  # per token: products with the body's weights
    answer_token: int  # per answer token: products with the head's weights
    attended: int  # per pair of tokens of which one attends to the other: attention


def costs_of(model: Any, head: Tensor) -> Costs:
    """Return the costs of ``model``, whose head has the weight ``head``."""
    counted_apart = {id(head), id(model.get_input_embeddings().weight)}  # an embedding is looked up, not multiplied
    body = sum(cost_per_token(p) for p in model.parameters() if id(p) not in counted_apart)
    text_config = model.config.get_text_config()
    return Costs(body, cost_per_token(head), 12 * text_config.num_hidden_layers * text_config.hidden_size)


def cost_per_token(weight: Tensor) -> int:
    return (6 if weight.requires_grad else 4) * weight_count(weight)


def weight_count(parameter: Tensor) -> int:
    if hasattr(parameter, "quant_state"):  # 4-bit weights: an element holds two or more
        return math.prod(parameter.quant_state.shape)
    return size_of(parameter)


def operations(costs: Costs, counts: Counter[str]) -> int:
    """Return the operations of tokens counted by :func:`irlfast.data.packing.token_counts`."""
    return (
        costs.token * counts["tokens"]
        + costs.answer_token * counts["answer_tokens"]
        + costs.attended * counts["attended"]
    )
