"""LoRA (arXiv 2106.09685): with ``use_peft``, every policy of a run is the run's first one and an adapter of its own.

A stage goes on with the adapter of the one before, and none is merged but in ``final/``: merged into 16 bits, changes
smaller than the weights' last digit are lost, which at the end of every stage would be most of what it learned.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from irlfast.config import Config
from irlfast.files import InputError, find, read_json
from irlfast.metrics import say

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
LEAST_KEPT = 0.9  # of what an adapter learned
LOST = "merging keeps {:.0%} of what the adapter learned, as {} rounds"


def base_and_adapter(name: Path | str) -> tuple[str, Path | None]:
    """What a model's name means: the folder or hub name of its weights, and its adapter's folder if it is an adapter.

    Raises:
        InputError: the adapter's base is not where it was.
    """
    folder = find(str(name))
    if not folder or not (folder / SETTINGS).exists():
        return str(folder or name), None
    base = read_json(folder / SETTINGS)["base_model_name_or_path"]
    if Path(base).is_absolute() and not Path(base).exists():
        raise InputError(f"adapter {folder}: found no {base}, expected its base as {SETTINGS} says")
    return base, folder


def is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


def add_lora(model: Any, config: Config, reward: bool) -> Any:
    """A new adapter on ``model``, seeded, that changes nothing yet."""
    import peft

    torch.manual_seed(config.seed)
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_target_modules,
        exclude_modules=["score"] if reward else None,
    )
    return adapted(model, settings, reward)


def load_lora(model: Any, folder: Path, reward: bool) -> Any:
    """``model`` with the policy's adapter in ``folder``, which a reward model can begin with, too.

    Raises:
        InputError: the adapter's weights are not those of its settings on this model.
    """
    import peft

    settings = peft.LoraConfig.from_pretrained(str(folder))
    settings.inference_mode, settings.base_model_name_or_path = False, None
    model = adapted(model, settings, reward)
    weights = load_file(folder / WEIGHTS)
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = weights.keys() ^ expected.keys()
    if wrong:
        raise InputError(f"adapter {folder}: {min(wrong)} is in one of {WEIGHTS} and its base with {SETTINGS} alone")
    peft.set_peft_model_state_dict(model, weights)
    return model


def adapted(model: Any, settings: Any, reward: bool) -> Any:
    import peft

    settings.task_type = "FEATURE_EXTRACTION" if reward else "CAUSAL_LM"
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # fp32 where the base has 4 bits, unlike what DeepSpeed trains
            parameter.data = parameter.data.to(model.dtype)
    if reward:  # its heads are in no adapter, and trained whole
        model.score.requires_grad_(True)
    return model


def save_lora(folder: Path, model: Any, state: dict[str, Tensor], base: str, tokenizer: Any) -> None:
    """The adapter in ``state``, in PEFT's format and to be put on the model ``base``, and the tokenizer."""
    local = find(base)
    model.peft_config["default"].base_model_name_or_path = str(local.resolve() if local else base)
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def merge(model: Any, what: str) -> Any:
    """An adapted model as a plain one, to be trained if asked; a warning names ``what`` where rounding loses much."""
    share = kept_by_merging(model)
    if share < LEAST_KEPT:
        say(f"warning: {what}: {LOST.format(share, str(model.dtype).removeprefix('torch.'))}")
    return model.merge_and_unload().requires_grad_(True)


def kept_by_merging(model: Any) -> float:
    """The share of what LoRA learned, δ, that is left when it is added to weights of few digits: ⟨kept, δ⟩ / ⟨δ, δ⟩."""
    kept = learned = 0.0
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            base, delta = layer.get_base_layer().weight.detach(), layer.get_delta_weight("default").detach()
            merged = base + delta.to(base.dtype)
            kept += ((merged.float() - base.float()) * delta.float()).sum().item()
            learned += delta.float().square().sum().item()
    return kept / learned if learned else 1.0
