"""lm-evaluation-harness (lm-eval) in a child process, which may run in another environment."""

import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from irlfast.common.files import InputError, find_path
from irlfast.common.secrets import redacted
from irlfast.models.lora import base_and_adapter, revision_of_base
from irlfast.sampling.vllm_sampler import LAUNCHERS

WORKER = Path(__file__).with_name("lm_eval_worker.py")
GET_LM_EVAL = "pip install lm-eval==0.4.13, or name an interpreter that has it in --lm_eval_python"


class Task(NamedTuple):
    """A task, a group or a tag of lm-eval."""

    name: str
    shots: int | None = None  # examples in the prompt; None: the task's own number
    metric: str = ""  # lm-eval's names of the metric and its filter; empty: all that the task has
    title: str = ""


# ---------------------------------------------------------------- the model


def model_arguments(model: str | Path, dtype: str, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments of lm-eval's ``hf`` model."""
    base, adapter = base_and_adapter(model)
    arguments: dict[str, Any] = {"pretrained": absolute(base), "dtype": dtype}
    if trust_remote_code:
        arguments["trust_remote_code"] = True
    if adapter:
        arguments |= {"peft": str(adapter.absolute()), "revision": revision_of_base(adapter)}
        if (adapter / "tokenizer_config.json").exists():
            arguments["tokenizer"] = arguments["peft"]
    return arguments


def absolute(name: str) -> str:
    """Return a folder's absolute path, or a hub name unchanged."""
    folder = find_path(name)
    return str(folder.absolute()) if folder else name


# ---------------------------------------------------------------- the child process


def lm_eval_version(interpreter: str) -> str:
    """Return the version of lm-eval that an interpreter has.

    Raises:
        InputError: it has none, or there is no such interpreter.
    """
    ask = "import importlib.metadata; print(importlib.metadata.version('lm_eval'))"
    try:
        answer = subprocess.run([interpreter, "-c", ask], capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"--lm_eval_python: {interpreter}: {error.strerror}; {GET_LM_EVAL}") from error
    if answer.returncode:
        raise InputError(f"--leaderboard: {interpreter} has no lm-eval; {GET_LM_EVAL}")
    return answer.stdout.strip()


def command_by_hand(job: Mapping[str, Any], task: Task) -> str:
    """Return the command of lm-eval that measures the same, in the folder of local copies if there is one."""
    words = [job["interpreter"], "-m", "lm_eval", "run", "--model", "hf", "--model_args", json.dumps(job["model_args"])]
    words += ["--tasks", task.name, "--batch_size", str(job["batch_size"])]
    if task.shots is not None:
        words += ["--num_fewshot", str(task.shots)]
    if job["include_path"]:
        words += ["--include_path", job["include_path"]]
    return shlex.join(words)


def run_worker(job: Mapping[str, Any], tasks: Sequence[Task], log_file: Path) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Yield each task with the worker's line on it. The worker is killed when this ends, for whatever reason."""
    left = list(tasks)
    if not left:
        return
    request = {**job, "tasks": [{"name": task.name, "num_fewshot": task.shots} for task in tasks]}
    variables = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+") as stdin, log_file.open("w", encoding="utf-8") as output:
        json.dump(request, stdin)
        stdin.seek(0)
        command = [job["interpreter"], str(WORKER)]
        with subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=output, env=variables, text=True
        ) as child:
            try:
                assert child.stdout
                for line in child.stdout:
                    if line.endswith("\n"):  # else the child died while it wrote the line
                        yield left.pop(0), json.loads(line, parse_constant=no_number)
            finally:
                child.kill()
                child.wait()
                redact(log_file)
    if left:
        fail(left[0], log_file)


def redact(log_file: Path) -> None:
    """Redact the secrets in what lm-eval and its libraries have printed."""
    log_file.write_text(redacted(log_file.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")


def no_number(name: str) -> None:
    """Stand for NaN, which lm-eval reports as the standard error of one question, and which is not JSON."""


def fail(task: Task, log_file: Path) -> NoReturn:
    """Raise the last error that the log of a dead worker shows."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    causes = [line for line in lines if re.match(r"[\w.]*(Error|Exception|NotFound)\b", line)]
    cause = one_line(causes[-1])[:300] if causes else "it named no error"
    raise InputError(f"--leaderboard: lm-eval cannot run {task.name} ({cause}); the whole log is {log_file}")


def one_line(text: str) -> str:
    return " ".join(text.split())
