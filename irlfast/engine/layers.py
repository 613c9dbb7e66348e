"""The layers of the model that a phase trains: recomputed, compiled, and checked to be deterministic."""

from collections.abc import Sequence
from typing import Any

from irlfast.config import Config
from irlfast.data.packing import PromptGroup, pack
from irlfast.models.prepare import PreparedModel
from irlfast.models.steady import check_steady, recompute_layers


def arrange_layers(prepared: PreparedModel, config: Config, groups: Sequence[PromptGroup]) -> None:
    """Recompute and compile the layers as configured, and check that they compute the same every time."""
    model = prepared.model
    if config.gradient_checkpointing:
        recompute_layers(model, selective=config.gradient_checkpointing == "selective")
    check_steady(model, pack(groups[:1], prepared.layout).to(prepared.base.device))
    if config.torch_compile:
        compile_layers(model)


def compile_layers(model: Any) -> None:
    """Compile every layer in place: once for all layers, and for batches of any shape."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)
