"""A model of a test as the trainer's `PreparedModel`, without the checks and choices of `prepare_model`."""

from typing import Any

from irlfast.data.packing import SHARED
from irlfast.models.costs import costs_of
from irlfast.models.prepare import PreparedModel
from irlfast.ops.common.heads import linear_module, scale_and_softcap, unwrapped


def prepared(model: Any) -> PreparedModel:
    base = unwrapped(model)
    module = linear_module(base, base.get_output_embeddings())
    return PreparedModel(model, base, module, *scale_and_softcap(base, module), SHARED, costs_of(base, module.weight))
