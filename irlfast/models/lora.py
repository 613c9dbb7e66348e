"""LoRA (arXiv 2106.09685): with ``use_peft``, every policy of a run is the run's first one and an adapter of its own.

A stage goes on with the adapter of the one before. Merged into 16 bits, changes smaller than the weights' last digit
are rounded, at the end of every stage anew; so ``final/`` and rewards alone are merged.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.common.files import InputError, find_path, read_json
from irlfast.common.messages import log
from irlfast.config import Config

SETTINGS = "adapter_config.json"  # PEFT's
TAKEN = {  # settings of PEFT's LoRA that are trained, saved and merged as they are
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("use_rslora", "use_dora", "init_lora_weights", "bias"),
    *("megatron_core", "qalora_group_size"),  # nothing by themselves
}
INITIAL = (True, False, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base as it is
LEAST_KEPT = 0.9  # of what an adapter learned
LOST = (
    "rounding to the nearest {} would keep {:.0%} of what the adapter learned; its weights are rounded up or down by "
    "chance instead, which keeps all of it on average"
)


def base_and_adapter(name: Path | str) -> tuple[str, Path | None]:
    """What a model's name means: the folder or hub name of its weights, and its adapter's folder if it is an adapter.

    An adapter whose folder was moved finds a base that was moved with it.

    Raises:
        InputError: it is no LoRA, or its base is not where it was.
    """
    folder = find_path(str(name))
    if not folder or not (folder / SETTINGS).exists():
        return str(folder or name), None
    settings = read_json(folder / SETTINGS)
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    if not base or kind != "LORA":
        raise InputError(f"adapter {folder}: found a {kind} of base {base}, expected a LORA that names its base")
    found = find_path(base) or moved(Path(base), folder.resolve())
    if not found and Path(base).is_absolute():
        raise InputError(f"adapter {folder}: found no {base}, expected its base as {SETTINGS} says")
    return str(found or base), folder


def moved(base: Path, adapter: Path) -> Path | None:
    """Where ``base`` lies now, if it kept its place relative to ``adapter``: the longest end of its path that is there.

    Only a whole model counts. A relative path is looked for whole, as its beginning is not known to have changed.
    """
    names = base.parts[1:] if base.is_absolute() else base.parts
    ends = [Path(*names[first:]) for first in range(len(names) if base.is_absolute() else 1)]
    places = (parent / end for end in ends for parent in adapter.parents)
    return next((x for x in places if (x / "config.json").exists() and not (x / SETTINGS).exists()), None)


def check_adapter(folder: Path, config: Config) -> None:
    """Whether training can go on with the adapter in ``folder`` as the configuration says.

    Raises:
        InputError: a setting of the adapter that would be lost, or another rank or scale than the configuration's.
    """
    found = read_json(folder / SETTINGS)
    odd = [name for name, value in found.items() if value and name not in TAKEN]
    if found.get("init_lora_weights", True) not in INITIAL:
        odd.append("init_lora_weights")
    if odd:
        raise InputError(
            f"adapter {folder}: found {odd[0]}: {found[odd[0]]!r}, which training cannot go on with; expected an "
            "adapter without it, or a whole model (PEFT's merge_and_unload makes one)"
        )
    for name, value in (("lora_r", found["r"]), ("lora_alpha", found["lora_alpha"])):
        if getattr(config, name) != value:
            raise InputError(
                f"{name}: found {getattr(config, name)}, but the adapter {folder}, with which training goes on, "
                f"has {value}; expected the same"
            )


def revision(name: Path | str, config: Config) -> str:
    """Of the weights that a model's name means: an adapter knows its base's, the given model has ``model_revision``."""
    _, adapter = base_and_adapter(name)
    if adapter:
        return read_json(adapter / SETTINGS).get("revision") or "main"
    return config.model_revision if str(name) == config.model_name_or_path else "main"


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
    settings.inference_mode = False
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
    try:
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:  # modules that are not there, or that PEFT cannot adapt
        raise InputError(f"lora_target_modules: found {settings.target_modules!r} ({error})") from error
    if model.config.get_text_config().tie_word_embeddings and hasattr(model.get_input_embeddings(), "lora_embedding_A"):
        raise InputError("lora_target_modules: found the embeddings, which the LM head shares; expected other modules")
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # fp32 where the base has 4 bits, unlike what DeepSpeed trains
            parameter.data = parameter.data.to(model.dtype)
    if reward:  # its heads are in no adapter, and trained whole
        model.score.requires_grad_(True)
    return model


def save_lora(folder: Path, model: Any, state: dict[str, Tensor], base: str, at: str, tokenizer: Any) -> None:
    """The adapter in ``state``, in PEFT's format, to be put on the model ``base`` of a revision, and the tokenizer."""
    local = find_path(base)
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = str(local.resolve() if local else base)
    settings.revision = None if local else at
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def merge(model: Any, what: str) -> Any:
    """An adapted model as a plain one; others as is. Where rounding to the nearest loses much, it rounds by chance.

    A line says so and names ``what``. benchmarks/merging.py compares both.
    """
    if not is_adapted(model):
        return model
    share = kept_by_merging(model)
    if share >= LEAST_KEPT:
        return model.merge_and_unload()
    log(f"{what}: {LOST.format(str(model.dtype).removeprefix('torch.'), share)}")
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    dtypes = {parameter: parameter.dtype for layer in layers for parameter in layer.get_base_layer().parameters()}
    for layer in layers:
        layer.float()
    plain, generator = model.merge_and_unload(), torch.Generator().manual_seed(0)
    for parameter, dtype in dtypes.items():
        if dtype == torch.bfloat16:  # some families keep a few layers in fp32
            parameter.data = rounded_by_chance(parameter.data, generator)
    return plain


def rounded_by_chance(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Each value as one of the two bf16 numbers beside it, the nearer more often, so that the mean is ``exact``."""
    noise = torch.randint(1 << 16, exact.shape, generator=generator, dtype=torch.int32)
    return ((exact.float().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


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
