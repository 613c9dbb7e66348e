"""The folder of a run: check that it can be written and that its run may continue; lock it against other runs."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

import yaml

from irlfast.common.files import InputError
from irlfast.common.messages import log
from irlfast.config import Config, difference, dump
from irlfast.config.checks import PER_STAGE

# Keys that may change in a run that has started, and what they change: never what is trained, or how.
MAY_CHANGE = {
    "output_dir": "the run was moved",
    "logging_steps": "how often metrics are logged",
    "save_steps": "how often checkpoints are written",
    "profile": "whether traces are written",
    "report_to": "where metrics go besides metrics.jsonl",
    "run_name": "the run's name on TensorBoard or W&B",
    "project": "the project's name on W&B",
    "push_to_hub": "whether final/ is uploaded",
    "hub_model_id": "where final/ is uploaded",
    "hub_private": "who sees the upload",
    "per_device_eval_batch_size": "how many answers are sampled or scored together: other draws of the same policy",
    "vllm_python": "which interpreter runs vLLM",
    "vllm_gpu_memory_utilization": "the memory that vLLM takes",
    "max_tokens_per_batch": "over how many micro-batches a gradient is summed",
    "gradient_checkpointing": "which activations are computed twice to save memory",
    "activation_offloading": "where activations are kept for the backward pass",
}
LOCKS: dict[Path, IO[str]] = {}  # the lock files of this process, open until it ends


def check_output(output: Path, config: Config) -> None:
    """Check that ``output`` can be written and, if it has a run, that the run may continue with ``config``.

    Raises:
        InputError: it cannot be written, or the run would end with other results; the message shows the difference.
    """
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"output_dir {output}: cannot be written: {nearest} is not a writable folder")
    if not (output / "config.yaml").exists():
        return
    old = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    new = yaml.safe_load(dump(config))
    refused, allowed = differences(old, new)
    if refused:
        raise InputError(f"output_dir {output}: its run has another configuration ({'; '.join(refused)})")
    if allowed:
        log(f"{output} continues with {', '.join(allowed)}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare a run's configuration with a ``new`` one: changes it cannot take, and changes it can.

    A change is described as ``key: old -> new (why)``.
    """
    refused, allowed = [], []
    for name in {**old, **new}:
        if old.get(name) == new.get(name):
            continue
        shown = difference({name: old.get(name)}, {name: new.get(name)})
        if name == "stages" and new[name] > old[name]:
            if new["prompts_per_stage"] == "all":
                allowed.append(f"{shown} (more stages)")
            else:
                refused.append(f"{shown}, and with prompts_per_stage: split more stages change the prompts of each")
        elif name in PER_STAGE and same_so_far(old, new, name):
            allowed.append(f"{shown} (values of later stages)")
        elif name == "logging_steps" and new.get("max_expert_drop"):
            refused.append(f"{shown}, and max_expert_drop ends a stage at a logged step")
        elif name in MAY_CHANGE:
            allowed.append(f"{shown} ({MAY_CHANGE[name]})")
        else:
            refused.append(shown)
    return refused, allowed


def same_so_far(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    """Return whether a key with one value per stage, or one for all, keeps its values at all of the old stages."""

    def values(given: dict[str, Any]) -> list[Any]:
        value = given.get(name)
        return value if isinstance(value, list) else [value] * given["stages"]

    return values(old) == values(new)[: old["stages"]]


def lock(output: Path) -> None:
    """Lock ``output`` against other runs until this process ends, even if it is killed.

    Raises:
        InputError: another process has the lock; the message says which.
    """
    path = output.absolute() / ".lock"
    if path in LOCKS:
        return
    output.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked child of a killed run would keep flock's
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read() or "another process"
        file.close()
        raise InputError(f"output_dir {output}: {owner} is running in it; expected another folder") from error
    except OSError as error:
        log(f"warning: output_dir {output} cannot be locked ({error.strerror}); start no second run in it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')},")
    file.flush()
    LOCKS[path] = file
