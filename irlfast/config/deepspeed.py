"""DeepSpeed's settings: those of the run, merged with the file that the key ``deepspeed`` names, and its checks.

Whatever depends on a setting reads the merged ones. Neither DeepSpeed nor torch is imported.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from irlfast.common import launch
from irlfast.common.files import InputError, find_path
from irlfast.config.types import shown

# Settings that other keys of a run decide. DeepSpeed would ignore them, or divide gradients a second time.
DECIDED_BY = {
    "optimizer": "optim, learning_rate and weight_decay",
    "scheduler": "lr_scheduler_type and warmup_ratio",
    "fp16": "dtype",
    "amp": "dtype",
}
SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SECTIONS = ("zero_optimization", "bf16", "data_types")


def zero_stage(config: Any) -> int:
    """Return the ZeRO stage that a run asks for: that of its file of DeepSpeed settings, or else of ``zero_stage``."""
    return merged_settings(config)["zero_optimization"]["stage"]


def gains_from_zero(config: Any, processes: int) -> bool:
    """Return whether ZeRO is worth its copies: one process in float32 has nothing to split or to round."""
    return processes > 1 or config.dtype != "float32" or bool(config.deepspeed)


def merged_settings(config: Any, hidden_size: int | None = None) -> dict[str, Any]:
    """Return DeepSpeed's settings for this run, with the file that ``deepspeed`` names merged over the run's own.

    A setting of the file that is ``auto`` gets the value that Transformers' ``Trainer`` gives it. Some of these follow
    from the model's ``hidden_size``; without it, DeepSpeed's defaults stand for them.

    Raises:
        InputError: as :func:`own_settings`.
    """
    bf16 = config.dtype == "bfloat16"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # train_step divides by the sizes itself
        "gradient_clipping": config.max_grad_norm,
        # With float32, and in ZeRO-3, DeepSpeed always skips a step whose gradient is not finite.
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    own, by_size = own_settings(config), sizes_of_buckets(hidden_size)
    for name in own.get("zero_optimization", {}).keys() & by_size.keys():
        if own["zero_optimization"][name] == "auto":
            settings["zero_optimization"][name] = by_size[name]
    for name, value in without_auto(own).items():
        both = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = settings[name] | value if both else value
    return settings


def sizes_of_buckets(hidden_size: int | None) -> dict[str, int]:
    """Return the settings that ``Trainer`` derives from the model (transformers/integrations/deepspeed.py)."""
    if not hidden_size:
        return {}
    return {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def own_settings(config: Any) -> dict[str, Any]:
    """Return the settings of the file that ``deepspeed`` names, without those that the run's keys decide.

    Raises:
        InputError: the file cannot be read, or has a setting that contradicts another key.
    """
    if not config.deepspeed:
        return {}
    path = find_path(config.deepspeed)
    if not path or not path.is_file():
        raise InputError(f"deepspeed: no such file: {config.deepspeed}")
    own = read_object(path)
    settings = without_auto(own)
    for name, keys in DECIDED_BY.items():
        section = settings.get(name)
        if section is not None and not is_off(section, own[name]):
            raise InputError(f"deepspeed: {path} has {name}; expected the keys {keys}, and here none or auto")
    for name in SECTIONS:
        if not isinstance(settings.get(name, {}), dict):
            raise InputError(f"deepspeed: {path} has {name}: {shown(settings[name])}, expected a JSON object")
    clipping = settings.get("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not 0 <= clipping < 1e9:
        raise InputError(f"deepspeed: {path} has gradient_clipping: {shown(clipping)}, expected a number from 0 on")
    check_stage(path, settings, config)
    check_same(path, settings.get("bf16", {}), "bf16.enabled", "dtype: bfloat16", config.dtype == "bfloat16")
    check_sizes(path, settings, config)
    accumulated = settings.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if accumulated not in ("fp32", *["bf16"] * (config.dtype == "bfloat16")):
        raise InputError(
            f"deepspeed: {path} has data_types.grad_accum_dtype: {shown(accumulated)}, expected fp32, or bf16 "
            "with dtype bfloat16"
        )
    for section, name in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if settings.get(section, {}).get(name, True) is not True:
            raise InputError(
                f"deepspeed: {path} has {section}.{name}: {shown(settings[section][name])}, with which a gradient that "
                "is not finite would be trained on; expected true"
            )
    return {name: value for name, value in own.items() if name not in (*DECIDED_BY, *SIZES)}


def is_off(section: Any, written: Any) -> bool:
    """Return whether a section of 16 bits is not enabled: ``Trainer`` enables one that is ``auto`` by another key."""
    if not isinstance(section, dict) or not isinstance(written, dict):
        return False
    return section.get("enabled") is False or written.get("enabled") == "auto"


def check_stage(path: Path, settings: dict[str, Any], config: Any) -> None:
    """Check the file's ZeRO stage. The key ``zero_stage`` has its default there, or says the same."""
    stage = settings.get("zero_optimization", {}).get("stage", config.zero_stage)
    if type(stage) is not int or stage not in range(4):
        raise InputError(f"deepspeed: {path} has zero_optimization.stage: {shown(stage)}, expected 0 to 3")
    if config.zero_stage not in (stage, type(config).__pydantic_fields__["zero_stage"].default):
        raise InputError(
            f"deepspeed: {path} has zero_optimization.stage: {stage}, and zero_stage is {config.zero_stage}; expected "
            "the same, or no zero_stage"
        )


def check_sizes(path: Path, settings: dict[str, Any], config: Any) -> None:
    """Check that the file's sizes of batches make the run's step: max_tokens_per_batch decides how it is cut.

    The processes are those that the run has, or that the command starts later.
    """
    whole = config.global_batch_size
    check_same(path, settings, "train_batch_size", "global_batch_size", whole)
    given = {name: settings[name] for name in SIZES[1:] if name in settings}
    if not given:
        return
    processes = launch.processes(config.num_processes)
    whole_numbers = len(given) == 2 and all(type(size) is int for size in given.values())
    if not (whole_numbers and math.prod(given.values()) * processes == whole):
        named = " and ".join(f"{name}: {shown(size)}" for name, size in given.items())
        raise InputError(
            f"deepspeed: {path} has {named}, and global_batch_size is {whole} in {processes} process"
            f"{'es' * (processes > 1)}; expected both sizes, whose product that is, or auto"
        )


def check_same(path: Path, settings: dict[str, Any], name: str, key: str, value: Any) -> None:
    """Check that a setting, if the file has it, says what the run's own key says."""
    given = settings.get(name.split(".")[-1], value)
    if type(given) is not type(value) or given != value:
        raise InputError(f"deepspeed: {path} has {name}: {shown(given)}, and {key} is {value!r}; expected the same")


def read_object(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"deepspeed: {path} cannot be read as JSON ({error})") from error
    if not isinstance(settings, dict):
        raise InputError(f"deepspeed: {path} holds a {type(settings).__name__}, expected a JSON object")
    return settings


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of the pairs; a name that comes twice is a ValueError."""
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{shown(name)} comes {count} times")
    return dict(pairs)


def without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings whose value is ``auto``."""
    nested = {name: without_auto(value) if isinstance(value, dict) else value for name, value in settings.items()}
    return {name: value for name, value in nested.items() if value != "auto"}
