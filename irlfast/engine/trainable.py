"""The model that a phase trains: with LoRA or without, its attention and layers arranged for packed batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irlfast.common import dist
from irlfast.config import Config
from irlfast.data.packing import Layout, PromptGroup, pack
from irlfast.models.attention import arrange
from irlfast.models.load import freeze, load_model
from irlfast.models.lora import add_lora, is_adapted
from irlfast.models.steady import check_steady, recompute_layers


def trainable_model(name: Path | str, config: Config, reward: dict[str, Any] | None, in_4bit: bool = False) -> Any:
    """Load a policy, or a reward model that is scored as ``reward`` says; add LoRA; freeze a reward's lower layers."""
    model = load_model(name, config, config.reward_heads if reward else 0, in_4bit)
    if config.use_peft and not is_adapted(model):
        model = add_lora(model, config, reward=bool(reward))
    if reward:
        model.config.irlfast_reward = reward
        freeze(model, config.reward_frozen_layers)
    return model


def arrange_layers(model: Any, config: Config, groups: Sequence[PromptGroup]) -> Layout:
    """Choose the attention, recompute and compile layers as configured; return how groups are packed for the model."""
    layout = arrange(model, config, groups)
    if config.gradient_checkpointing:
        recompute_layers(model, selective=config.gradient_checkpointing == "selective")
    check_steady(model, pack(groups[:1], layout).to(dist.device()))
    if config.torch_compile:
        compile_layers(model)
    return layout


def compile_layers(model: Any) -> None:
    """Compile every layer in place: once for all layers, and for batches of any shape."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)
