"""Models that ZeRO-3 splits while they are loaded: no process ever holds more than its part and one whole tensor.

The model is made without memory for its parameters. The main process reads one tensor after the other, and each is
split among all processes before the next one is read.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError, find_path
from irlfast.common.messages import log_once
from irlfast.common.tensors import is_finite
from irlfast.config import Config
from irlfast.config.deepspeed import merged_settings
from irlfast.models.configs import building_options
from irlfast.models.saved import is_converted


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    shape: list[int]


def load_split(base: str, revision: str, config: Config, heads: int = 0, foreign: bool = False) -> tuple[Any, set[str]]:
    """Load a model, each of its parameters split among all processes, and return the names of tensors without a place.

    With ``heads``, it is a reward model that was saved with as many. A ``foreign`` one is a reward model of another
    project, with the heads and the dtype of its checkpoint.

    Unless the tensors of its safetensors files are the model's own one by one, it must be loaded whole: log why, and
    return None in its place.

    Raises:
        InputError: a weight is not finite.
    """
    stored = dist.on_main(lambda: stored_tensors(folder_of(base, revision)))
    model = model_without_memory(base, revision, config, heads, foreign)
    if reason := why_whole(model, stored):
        log_once(f"model {base}: each process loads it whole, because {reason}")
        return None, set()
    split: list[Any] = []
    bad: list[str] = []
    places = places_of_parameters(model)
    most = max(parameter.nbytes for parameter in model.parameters())
    whole = torch.empty(most, dtype=torch.uint8, device=dist.device())  # one after the other
    for name, parameter in list(model.named_parameters()):
        place = whole[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        own = torch.nn.Parameter(place, parameter.requires_grad)
        if dist.is_main():
            read_tensor(stored[name].path, name, own.data)
            if not is_finite(own.data):
                bad.append(name)
        split_parameter(own, split, config)
        split.append(own)
        for module, key in places[id(parameter)]:
            module._parameters[key] = own
    refuse_not_finite(base, dist.on_main(lambda: bad))
    return model, stored.keys() - model.state_dict().keys()


def refuse_not_finite(name: str, tensors: list[str]) -> None:
    """Raise an InputError if a model has ``tensors`` that are not finite."""
    if tensors:
        raise InputError(
            f"model {name}: {tensors[0]} (of {len(tensors):,} tensors) is not finite; expected finite weights"
        )


def folder_of(base: str, revision: str) -> Path:
    """Return a model's folder, downloaded if need be."""
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors"]
    return find_path(base) or Path(snapshot_download(base, revision=revision, allow_patterns=kinds))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder's safetensors files, by name; none if its checkpoint has another format."""
    from safetensors import safe_open

    stored: dict[str, Stored] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= {name: Stored(path, file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return stored


def read_tensor(path: Path, name: str, into: Tensor) -> None:
    """Read a tensor. Its file is closed again, because the pages that were read count as memory of the process."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        into.copy_(file.get_tensor(name))


def model_without_memory(base: str, revision: str, config: Config, heads: int, foreign: bool) -> Any:
    """Make a model whose parameters have shapes, but no memory. Its buffers are there."""
    import transformers

    reward = heads or foreign
    kind: Any = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    options = {"num_labels": heads} if heads else {}
    model_config = transformers.AutoConfig.from_pretrained(
        base, revision=revision, trust_remote_code=config.trust_remote_code, **options
    )
    built = building_options(config)
    if foreign:
        built = {"dtype": model_config.dtype, "trust_remote_code": config.trust_remote_code}
    with parameters_without_memory():
        model = kind.from_config(model_config, **built)
    with contextlib.suppress(OSError):  # most models have such a file
        model.generation_config = transformers.GenerationConfig.from_pretrained(base, revision=revision)
    return model


@contextlib.contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Within the context, every new parameter of a module goes to torch's ``meta`` device."""
    module_class: Any = torch.nn.Module
    register = module_class.register_parameter

    def without_memory(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    module_class.register_parameter = without_memory
    try:
        yield
    finally:
        module_class.register_parameter = register


def why_whole(model: Any, stored: dict[str, Stored]) -> str:
    """Return why a checkpoint cannot be split while it is loaded, or an empty text."""
    if not stored:
        return "its checkpoint is no safetensors"
    if is_converted(model):
        return "Transformers converts its tensors"
    if model.config.dtype is None:
        return "its config.json names no dtype"
    own = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if other := sorted(name for name, shape in own.items() if name not in stored or stored[name].shape != shape):
        return f"its checkpoint has no {other[0]} of that name and shape"
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    if kept and model.dtype != torch.float32:
        return f"it keeps {kept[0]} in float32"
    buffers = model.state_dict().keys() - own.keys() - tied_names(model)
    return f"its checkpoint has the buffer {min(buffers)}" if buffers else ""


def tied_names(model: Any) -> set[str]:
    """Return all names of parameters that have several."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def places_of_parameters(model: torch.nn.Module) -> dict[int, list[tuple[torch.nn.Module, str]]]:
    """Return the modules that hold each parameter, which is given by its ``id``, and its name there."""
    places = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            places[id(parameter)].append((module, key))
    return places


def split_parameter(parameter: Any, split: list[Any], config: Config) -> None:
    """Split a parameter of the main process among all processes, as those that are ``split`` already."""
    import deepspeed

    if split:
        split[0].convert_to_zero_parameters([parameter])
    else:
        settings = merged_settings(config)
        deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=settings)


# ---------------------------------------------------------------- a split model at work


def is_split(model: torch.nn.Module) -> bool:
    """Return whether ZeRO-3 has split the parameters of a model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def size_of(parameter: Tensor) -> int:
    """Return the number of a parameter's values, of which a process may hold a part only."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextlib.contextmanager
def gathered(*parameters: Tensor | None) -> Iterator[None]:
    """Within the context, every process has the whole of the parameters, which must not be changed."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


@contextlib.contextmanager
def runnable(model: torch.nn.Module, config: Config) -> Iterator[None]:
    """Within the context, a model that is split runs: each module's parameters are gathered while it does.

    Afterwards DeepSpeed's engine does that by itself.
    """
    if not is_split(model):
        yield
        return
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    root = torch.nn.ModuleList([model])  # whose forward pass nobody calls, so that nothing about the order is recorded
    hooks = DeepSpeedZeRoOffload(
        root, NoopTimer(), merged_settings(config), overlap_comm=False, param_persistence_threshold=0
    )
    find_foreign_reads(model, True)
    try:
        yield
    finally:
        find_foreign_reads(model, False)
        hooks.partition_all_parameters()
        hooks.destroy()
        for module in model.modules():  # or the engine's backward passes would go on with these hooks
            for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
                vars(module).pop(name, None)


def find_foreign_reads(model: torch.nn.Module, wanted: bool) -> None:
    """Let DeepSpeed gather a parameter where another module than its own reads it, as DeBERTa's encoder does."""
    for module in model.modules():
        parameters: Any = module._parameters
        parameters._in_forward = wanted
