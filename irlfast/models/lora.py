"""LoRA (arXiv 2106.09685): with ``use_peft``, every policy of a run is the run's first model with an adapter.

A stage continues the adapter of the stage before it. Only ``final/`` and reward models are merged: merging into 16 bits
rounds away changes that are smaller than the last digit of the weights, and would do so at the end of every stage.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.common.files import InputError, find_path, read_json
from irlfast.common.messages import explain_errors, log
from irlfast.config import Config
from irlfast.models.saved import check_saved

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's file of an adapter's settings
SUPPORTED = {  # settings of PEFT's LoRA with which training can go on: they are trained, saved and merged as they are
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("use_rslora", "use_dora", "init_lora_weights", "bias"),
    *("megatron_core", "qalora_group_size"),  # without effect by themselves
}
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that do not change the base
ROUTER = re.compile(r"(^|\.)(gate|router\w*|shared_expert_gate)(\.|$)")  # the name of a layer that chooses experts
MIN_SHARE_KEPT = 0.9  # of what an adapter learned, when its weights are rounded to the nearest number
STOCHASTIC = (
    "rounding to the nearest {} would keep {:.0%} of what the adapter learned; its weights are rounded up or down by "
    "chance instead, which keeps all of it on average"
)


def base_and_adapter(name: Path | str) -> tuple[str, Path | None]:
    """Return a model's folder or hub name, and None; or if ``name`` is an adapter's folder, the base and that folder.

    If an adapter's folder was moved together with its base, the base is found in its new place.

    Raises:
        InputError: the adapter is no LoRA, or its base is not where the adapter's settings say.
    """
    folder = find_path(str(name))
    if not folder or not (folder / ADAPTER_CONFIG).exists():
        return str(folder or name), None
    settings = adapter_settings(folder)
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    if not isinstance(base, str) or not base or kind != "LORA":
        raise InputError(f"adapter {folder}: found a {kind} of base {base}, expected a LORA that names its base")
    base_folder = find_path(base) or find_moved(Path(base), folder.resolve())
    if not base_folder and Path(base).is_absolute():
        raise InputError(f"adapter {folder}: found no {base}, expected its base as {ADAPTER_CONFIG} says")
    return str(base_folder or base), folder


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Read PEFT's settings of an adapter.

    Raises:
        InputError: they are no JSON object.
    """
    with explain_errors(f"adapter {folder}: its {ADAPTER_CONFIG} cannot be read"):
        settings = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(settings, dict):
        raise InputError(f"adapter {folder}: found {ADAPTER_CONFIG} without an object, expected PEFT's settings")
    return settings


def find_moved(base: Path, adapter: Path) -> Path | None:
    """Return the folder where ``base`` lies now, if it moved together with the folder ``adapter``; else None.

    Every ending of an absolute path is tried beside every parent of the adapter, the longest ending first. A relative
    path is tried as a whole only. The folder must hold a whole model.
    """
    names = base.parts[1:] if base.is_absolute() else base.parts
    endings = [Path(*names[first:]) for first in range(len(names) if base.is_absolute() else 1)]
    places = (parent / ending for ending in endings for parent in adapter.parents)
    return next((x for x in places if (x / "config.json").exists() and not (x / ADAPTER_CONFIG).exists()), None)


def check_adapter(folder: Path, config: Config) -> None:
    """Check that training can go on with the adapter in ``folder``, as the configuration says.

    Raises:
        InputError: training would lose a setting of the adapter, or the configuration has another rank or scale.
    """
    settings = adapter_settings(folder)
    unsupported = [name for name, value in settings.items() if value and name not in SUPPORTED]
    if settings.get("init_lora_weights", True) not in KEEPS_BASE:
        unsupported.append("init_lora_weights")
    if unsupported:
        name = unsupported[0]
        raise InputError(
            f"adapter {folder}: found {name}: {settings[name]!r}, which training cannot go on with; expected an "
            "adapter without it, or a whole model (PEFT's merge_and_unload makes one)"
        )
    for name, value in (("lora_r", settings.get("r")), ("lora_alpha", settings.get("lora_alpha"))):
        if getattr(config, name) != value:
            raise InputError(
                f"{name}: found {getattr(config, name)}, but the adapter {folder}, with which training goes on, "
                f"has {value}; expected the same"
            )


def revision_of_base(adapter: Path) -> str:
    """Return the revision that an adapter's settings name for its base on the hub."""
    return adapter_settings(adapter).get("revision") or "main"


def revision_of(name: Path | str, config: Config) -> str:
    """Return the revision of a model's weights on the hub.

    The run's own model has ``model_revision``, and an adapter names the revision of its base. All others are ``main``.
    """
    _, adapter = base_and_adapter(name)
    if adapter:
        return revision_of_base(adapter)
    return config.model_revision if str(name) == config.model_name_or_path else "main"


def has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def add_lora(model: Any, config: Config, reward: bool) -> Any:
    """Return ``model`` with a new, seeded adapter, which does not change the model's outputs yet.

    ``lora_target_modules: all-linear`` leaves out the routers of a mixture of experts.
    """
    import peft

    torch.manual_seed(config.seed)
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_target_modules,
        exclude_modules=["score"] if reward else None,
    )
    model = wrap(model, settings, reward)
    if config.lora_target_modules == "all-linear":
        leave_out_routers(model)
    return model


def leave_out_routers(model: Any) -> None:
    """Take the adapter off the layers that choose experts, and note in its settings that they have none.

    A router that changes sends tokens to other experts, so that a small step may change the policy much.
    """
    import peft

    settings = model.peft_config["default"]
    routers = {
        name.removeprefix("base_model.model."): layer.get_base_layer()
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer) and ROUTER.search(name)
    }
    for name, layer in routers.items():
        model.base_model.model.set_submodule(name, layer)
    if routers:
        settings.exclude_modules = [*(settings.exclude_modules or []), *routers]
        if settings.target_parameters:
            settings.target_parameters = {name for name in settings.target_parameters if not ROUTER.search(name)}


def load_lora(model: Any, folder: Path, reward: bool) -> Any:
    """Return ``model`` with the adapter in ``folder``. A reward model can begin with a policy's adapter.

    Raises:
        InputError: the adapter's weights cannot be read, or are not those that its settings ask for on this model.
    """
    import peft

    with explain_errors(f"adapter {folder}: its settings cannot be used"):
        settings = peft.LoraConfig.from_pretrained(str(folder))
        settings.inference_mode = False
        model = wrap(model, settings, reward)
    with explain_errors(f"adapter {folder}: its weights cannot be loaded"):
        weights = peft.utils.load_peft_weights(str(folder), device="cpu")
        report: Any = peft.set_peft_model_state_dict(model, weights)
    missing = [name for name in report.missing_keys if "lora_" in name]
    for article, names in (("no", missing), ("an unexpected", report.unexpected_keys)):
        if names:
            raise InputError(
                f"adapter {folder}: found {article} {names[0]}, expected the weights of its {ADAPTER_CONFIG}"
            )
    return model


def wrap(model: Any, settings: Any, reward: bool) -> Any:
    """Return PEFT's wrapper around ``model``, with an adapter of these settings in the model's dtype.

    Raises:
        InputError: ``lora_target_modules`` names modules that the model lacks or that PEFT cannot adapt.
    """
    import peft

    settings.task_type = "FEATURE_EXTRACTION" if reward else "CAUSAL_LM"
    try:
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise InputError(f"lora_target_modules: found {settings.target_modules!r} ({error})") from error
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)  # a few families lack the key
    if tied and hasattr(model.get_input_embeddings(), "lora_embedding_A"):
        raise InputError("lora_target_modules: found the embeddings, which the LM head shares; expected other modules")
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # PEFT makes them fp32 on a 4-bit base; DeepSpeed trains one dtype
            parameter.data = parameter.data.to(model.dtype)
    if reward:  # the heads have no adapter and are trained whole
        model.score.requires_grad_(True)
    return model


def save_lora(folder: Path, model: Any, state: dict[str, Tensor], base: str, at: str, tokenizer: Any) -> None:
    """Write the adapter's tensors in ``state`` in PEFT's format, and the tokenizer.

    The settings name ``base`` as the model to put the adapter on, in the revision ``at`` if it lies on the hub.
    """
    local = find_path(base)
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = str(local.resolve() if local else base)
    settings.revision = None if local else at
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    check_saved(folder, tokenizer, {name.replace(".default", ""): tensor for name, tensor in state.items()})


def merge(model: Any, label: str) -> Any:
    """Merge a model's adapter into its weights; return a model without an adapter as it is.

    Weights are rounded to the nearest number, unless that loses much of what the adapter learned. Then they are rounded
    stochastically, and a line that begins with ``label`` says so. benchmarks/merging.py compares both.
    """
    if not has_adapter(model):
        return model
    share = share_kept(model)
    if share >= MIN_SHARE_KEPT:
        return model.merge_and_unload()
    log(f"{label}: {STOCHASTIC.format(str(model.dtype).removeprefix('torch.'), share)}")
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    dtypes = {parameter: parameter.dtype for layer in layers for parameter in layer.get_base_layer().parameters()}
    for layer in layers:
        layer.float()
    merged, generator = model.merge_and_unload(), torch.Generator().manual_seed(0)
    for parameter, dtype in dtypes.items():
        if dtype == torch.bfloat16:  # some families keep a few layers in fp32
            parameter.data = round_stochastically(parameter.data, generator)
    return merged


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Round each value up or down to bf16 at random, the nearer number more often, so that the mean is ``exact``."""
    noise = torch.randint(1 << 16, exact.shape, generator=generator, dtype=torch.int32)
    return ((exact.float().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def share_kept(model: Any) -> float:
    """Return the share of what LoRA learned that is left after merging with rounding to the nearest number.

    With δ for the adapters' change of the weights, the share is ⟨kept, δ⟩ / ⟨δ, δ⟩.
    """
    kept = learned = 0.0
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            is_experts = hasattr(layer, "get_param")
            base = (layer.get_param() if is_experts else layer.get_base_layer().weight).detach()
            delta = layer.get_delta_weight("default").detach()
            merged = base + delta.to(base.dtype)
            kept += ((merged.float() - base.float()) * delta.float()).sum().item()
            learned += delta.float().square().sum().item()
    return kept / learned if learned else 1.0
