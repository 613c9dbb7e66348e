"""The folder of a run: whether it can be written, is in nobody else's hands, and goes on with this configuration."""

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

# Keys that may change in a run that was begun, and what changes with them; never what was trained or how.
HARMLESS = {
    "output_dir": "the run was moved",
    "logging_steps": "how often figures are logged",
    "save_steps": "how often checkpoints are written",
    "profile": "whether traces are written",
    "report_to": "where figures go besides metrics.jsonl",
    "run_name": "the run's name there",
    "project": "the project's name there",
    "push_to_hub": "whether final/ is uploaded",
    "hub_model_id": "where final/ is uploaded",
    "hub_private": "who sees the upload",
    "per_device_eval_batch_size": "how many are sampled or scored together: other draws of the same policy",
    "vllm_python": "which interpreter runs vLLM",
    "vllm_gpu_memory_utilization": "the memory that vLLM takes",
    "max_tokens_per_batch": "in how many pieces a gradient is summed",
    "gradient_checkpointing": "what is computed twice to save memory",
    "activation_offloading": "where activations wait",
}
HELD: dict[Path, IO[str]] = {}  # locks of this process, open until it ends


def check_output(output: Path, config: Config) -> None:
    """Whether ``output`` can be written, and its run, if any, goes on with ``config``.

    Raises:
        InputError: it cannot, or the run would end with other results; the message shows the difference.
    """
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"output_dir {output}: cannot be written, for {nearest} is no writable folder")
    if not (output / "config.yaml").exists():
        return
    old = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    new = yaml.safe_load(dump(config))
    harmful, harmless = differences(old, new)
    if harmful:
        raise InputError(f"output_dir {output}: its run has another configuration ({'; '.join(harmful)})")
    if harmless:
        log(f"{output} goes on with {', '.join(harmless)}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a run begun as ``old`` cannot take over from ``new``, and what it can, as ``key: old -> new (why)``."""
    harmful, harmless = [], []
    for name in {**old, **new}:
        if old.get(name) == new.get(name):
            continue
        shown = difference({name: old.get(name)}, {name: new.get(name)})
        if name == "stages" and new[name] > old[name]:
            if new["prompts_per_stage"] == "all":
                harmless.append(f"{shown} (more stages)")
            else:
                harmful.append(f"{shown}, and with prompts_per_stage: split more stages change the prompts of each")
        elif name in PER_STAGE and begins_alike(old, new, name):
            harmless.append(f"{shown} (what later stages take)")
        elif name == "logging_steps" and new.get("max_expert_drop"):
            harmful.append(f"{shown}, and max_expert_drop ends a stage at a logged step")
        elif name in HARMLESS:
            harmless.append(f"{shown} ({HARMLESS[name]})")
        else:
            harmful.append(shown)
    return harmful, harmless


def begins_alike(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    """Whether a key that may be a list, a value a stage, has the old values at all of the old stages."""

    def values(given: dict[str, Any]) -> list[Any]:
        value = given.get(name)
        return value if isinstance(value, list) else [value] * given["stages"]

    return values(old) == values(new)[: old["stages"]]


def hold(output: Path) -> None:
    """Keep other runs out of ``output`` until this process ends, in whatever way it does.

    Raises:
        InputError: another process holds it; the message says which.
    """
    path = output.absolute() / ".lock"
    if path in HELD:
        return
    output.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in a forked child of a killed run
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read() or "another process"
        file.close()
        raise InputError(f"output_dir {output}: {owner} is at work in it; expected another folder") from error
    except OSError as error:
        log(f"warning: output_dir {output} cannot be locked ({error.strerror}); let no second run use it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, begun {time.strftime('%Y-%m-%d %H:%M:%S')},")
    file.flush()
    HELD[path] = file
