"""The folder of a run: check that it can be written and that its run may continue."""

import dataclasses
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from irlfast.common.artefacts import MANIFEST, finish_kept, intact, keep_text, notes
from irlfast.common.files import InputError, remove_temporary, resolved
from irlfast.common.messages import log
from irlfast.common.secrets import restored
from irlfast.config import Config, difference, dump
from irlfast.config.checks import PER_STAGE
from irlfast.config.types import DATASETS, FILES, FUNCTIONS, MODELS, SEVERAL_MODELS
from irlfast.runs.lock import lock

# Keys that may change in a run that has started, and what they change. All others shape the result. Keys of memory and
# of speed are among these: they change the result by rounding alone.
MAY_CHANGE = {
    "output_dir": "the run was moved",
    "num_processes": "how many processes a command without a launcher starts",
    "logging_steps": "how often metrics are logged",
    "save_steps": "how often checkpoints are written",
    "async_save": "whether training waits while a checkpoint is written",
    "save_total_limit": "how many stages' policies are kept",
    "preemption_grace": "how long a run that is asked to stop may take",
    "eval_every_stage": "which policies are evaluated",
    "max_bad_steps": "after how many bad steps a phase goes back, or the run stops",
    "on_spike": "whether the run stops at a spike",
    "profile": "whether traces are written",
    "report_to": "where metrics go besides metrics.jsonl",
    "run_name": "the run's name on trackers",
    "project": "the project's name on trackers",
    "push_to_hub": "whether final/ is uploaded",
    "hub_model_id": "where final/ is uploaded",
    "hub_private": "who sees the upload",
    "per_device_eval_batch_size": "how many answers are sampled or scored together: other draws of the same policy",
    "scorer": "how `irlfast evaluate` scores answers",
    "ds3_gather_for_generation": "whether a process has the whole policy while it samples",
    "vllm_python": "which interpreter runs vLLM",
    "vllm_tensor_parallel_size": "how many GPUs an engine of vLLM takes",
    "vllm_gpu_memory_utilization": "the memory that vLLM takes",
    "vllm_server": "which servers sample",
    "vllm_server_requests": "how many answers a server has in work",
    "max_tokens_per_batch": "over how many micro-batches a gradient is summed",
    "stall_timeout": "when a run that hangs ends",
    "gradient_checkpointing": "which activations are computed twice to save memory",
    "activation_offloading": "where activations are kept for the backward pass",
    "attn_implementation": "which kernels compute the attention",
    "torch_compile": "whether the layers are compiled",
    "zero_stage": "how the processes share the state of training",
    "deepspeed": "how DeepSpeed uses memory; its gradient_clipping is max_grad_norm",
}
RATES = ("learning_rate", "sft_learning_rate", "reward_learning_rate")  # a run that has started takes lower ones
PLACES = {"output_dir", *DATASETS, *FILES, *MODELS, *SEVERAL_MODELS, *FUNCTIONS}  # keys that may name files or folders


def check_output(output: Path, config: Config) -> list[str]:
    """Check that ``output`` can be written and, if it has a run, lock it and check that it may continue so.

    Returns:
        The changes of the configuration with which the run continues.

    Raises:
        InputError: it cannot be written, or another run is in it, or its run would end with other results.
    """
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"output_dir {output}: cannot be written: {nearest} is not a writable folder")
    if output.exists():
        if output.stat().st_mode & stat.S_IWOTH:
            log(f"warning: output_dir {output}: every user can write it, and so can change the models of the run")
        lock(output)
        finish_kept(output)
        remove_temporary(output)
        return check_config(output, config)
    return []


def check_config(output: Path, config: Config) -> list[str]:
    """Compare ``config.yaml`` of a run with ``config``, and return the changes.

    A lost file is written again, if ``config`` is what it held.

    Raises:
        InputError: the run would end with other results, and the message shows the difference; or the file is lost.
    """
    path, noted = output / "config.yaml", notes(output)
    # The first line of a MANIFEST may be what a full disk did not take: then nothing was made yet.
    if not path.exists() and not noted and not any(output.glob(f"*/{MANIFEST}")):
        return []
    if path.name not in noted:
        raise InputError(
            f"output_dir {output}: its run has no {path.name} with a checksum in {MANIFEST}, so that nothing says what "
            "it is; expected a new output_dir"
        )
    if not intact(path):
        lost = f"{path}: is missing or damaged, and held another configuration than this; put it back"
        keep_text(path, dump(config), lost)
    new = dataclasses.asdict(config)
    old = restored(yaml.safe_load(path.read_text(encoding="utf-8")), new)
    refused, allowed = differences(old, new)
    if refused:
        raise InputError(f"output_dir {output}: its run has another configuration ({'; '.join(refused)})")
    if allowed:
        log(f"{output} continues with {', '.join(allowed)}")
    return allowed


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare a run's configuration with a ``new`` one: changes it cannot take, and changes it can.

    A change is described as ``key: old -> new (why)``. A key that the old one lacks, because it is younger, has its
    default there. Two spellings of one file or folder are no change.
    """
    old = {name: value for name, value in dataclasses.asdict(Config()).items() if name in new} | old
    refused, allowed = [], []
    for name in {**old, **new}:
        if is_same(name, old.get(name), new.get(name)):
            continue
        shown = difference({name: old.get(name)}, {name: new.get(name)})
        if name == "stages" and new[name] > old[name]:
            if new["async_sampling"]:
                refused.append(f"{shown}, and with async_sampling the last stage has asked nothing for a further one")
            elif new["prompts_per_stage"] == "all":
                allowed.append(f"{shown} (more stages)")
            else:
                refused.append(f"{shown}, and with prompts_per_stage: split more stages change the prompts of each")
        elif name in PER_STAGE and same_so_far(old, new, name):
            allowed.append(f"{shown} (values of later stages)")
        elif name in RATES and is_lower(old, new, name):
            allowed.append(f"{shown} (lower, in the phases that are not finished)")
        elif name == "logging_steps" and new.get("max_expert_drop"):
            refused.append(f"{shown}, and max_expert_drop ends a stage at a logged step")
        elif name in MAY_CHANGE:
            allowed.append(f"{shown} ({MAY_CHANGE[name]})")
        else:
            refused.append(shown)
    return refused, allowed


def is_same(name: str, old: Any, new: Any) -> bool:
    """Return whether two values of a key are equal, or spell the same files and folders."""
    return old == new or (name in PLACES and with_paths(old) == with_paths(new))


def with_paths(value: Any) -> Any:
    """Return the value of a key with the absolute path of each file or folder that it names."""
    if isinstance(value, dict):
        return value | {"name": with_paths(value["name"])}
    if isinstance(value, list):
        return [with_paths(each) for each in value]
    is_name = isinstance(value, str) and "{" not in value  # a chat template may be given as a text
    return resolved(value) if is_name else value


def same_so_far(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    """Return whether a key with one value per stage, or one for all, keeps its values at all of the old stages."""

    return by_stage(old, name) == by_stage(new, name)[: old["stages"]]


def is_lower(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    """Return whether a learning rate is at most the old one at each of the old stages. It may be that of the policy."""
    before, now = (by_stage(given, "learning_rate" if given.get(name) is None else name) for given in (old, new))
    return all(rate <= earlier for rate, earlier in zip(now, before, strict=False))


def by_stage(given: dict[str, Any], name: str) -> list[Any]:
    """Return the value of a key at each stage."""
    value = given.get(name)
    return value if isinstance(value, list) else [value] * given["stages"]
