"""LoRA (arXiv 2106.09685): with ``use_peft``, every policy of a run is the run's first one and an adapter of its own.

A stage goes on with the adapter of the one before. Merged into 16 bits, changes smaller than the weights' last digit
are lost, which at the end of every stage would be most of what it learned; so ``final/`` and rewards alone are merged.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.config import Config
from irlfast.files import InputError, find, read_json
from irlfast.metrics import say

SETTINGS = "adapter_config.json"  # PEFT's
LEAST_KEPT = 0.9  # of what an adapter learned
LOST = "merging keeps {:.0%} of what the adapter learned, as {} rounds"


def base_and_adapter(name: Path | str) -> tuple[str, Path | None]:
    """What a model's name means: the folder or hub name of its weights, and its adapter's folder if it is an adapter.

    Raises:
        InputError: it is no LoRA, or its base is not where it was.
    """
    folder = find(str(name))
    if not folder or not (folder / SETTINGS).exists():
        return str(folder or name), None
    settings = read_json(folder / SETTINGS)
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    if not base or kind != "LORA":
        raise InputError(f"adapter {folder}: found a {kind} of base {base}, expected a LORA that names its base")
    if Path(base).is_absolute() and not Path(base).exists():
        raise InputError(f"adapter {folder}: found no {base}, expected its base as {SETTINGS} says")
    return str(find(base) or base), folder


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
        InputError: the adapter's weights are missing, or not those of its settings on this model.
    """
    import peft

    settings = peft.LoraConfig.from_pretrained(str(folder))
    settings.inference_mode, settings.base_model_name_or_path = False, None
    model = adapted(model, settings, reward)
    try:
        weights = peft.utils.load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError) as error:
        raise InputError(f"adapter {folder}: its weights cannot be loaded ({error})") from error
    found: Any = peft.set_peft_model_state_dict(model, weights)
    missing = [name for name in found.missing_keys if "lora_" in name]
    for what, names in (("no", missing), ("an unexpected", found.unexpected_keys)):
        if names:
            raise InputError(f"adapter {folder}: found {what} {names[0]}, expected the weights of its {SETTINGS}")
    return model


def adapted(model: Any, settings: Any, reward: bool) -> Any:
    import peft

    settings.task_type = "FEATURE_EXTRACTION" if reward else "CAUSAL_LM"
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    if model.config.get_text_config().tie_word_embeddings and hasattr(model.get_input_embeddings(), "lora_embedding_A"):
        raise InputError("lora_target_modules: found the embeddings, which the LM head shares; expected other modules")
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
    """An adapted model as a plain one, with a warning that names ``what`` where rounding loses much; others as is."""
    if not is_adapted(model):
        return model
    share = kept_by_merging(model)
    if share < LEAST_KEPT:
        say(f"warning: {what}: {LOST.format(share, str(model.dtype).removeprefix('torch.'))}")
    return model.merge_and_unload()


def kept_by_merging(model: Any) -> float:
    """The share of what LoRA learned, δ, that is left when it is added to weights of few digits: ⟨kept, δ⟩ / ⟨δ, δ⟩."""
    kept = learned = 0.0
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            experts = hasattr(layer, "get_param")
            base = (layer.get_param() if experts else layer.get_base_layer().weight).detach()
            delta = layer.get_delta_weight("default").detach()
            merged = base + delta.to(base.dtype)
            kept += ((merged.float() - base.float()) * delta.float()).sum().item()
            learned += delta.float().square().sum().item()
    return kept / learned if learned else 1.0
