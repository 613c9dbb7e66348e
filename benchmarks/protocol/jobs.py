"""The jobs of the worker processes: train a policy, and measure it. A finished job leaves a file, and is skipped.

A job that was stopped begins anew: it takes seconds, and its tokens are counted from its beginning.
"""

import contextlib
import gc
import importlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.conftest import ROOT
from benchmarks.protocol.arms import ARMS, START, Arm
from benchmarks.protocol.budget import counted
from benchmarks.protocol.figures import JUDGES, Figures, means
from benchmarks.protocol.tasks import TASKS, Size, files_of
from irlfast.common.files import read_json, read_jsonl, write_json, write_jsonl, write_text
from irlfast.config import Config
from irlfast.config.methods import METHOD_FACTS
from irlfast.config.read import make_config

ANSWERS = 64  # trained on per optimiser step, in every arm
STAGES = 2  # of an arm that names no other number
START_RATE = 2e-3
PILOT_STEPS = 4  # of all stages together
UNANSWERED = 0.75  # of the prompts of an on-policy arm, in a task that has prompts without answers
COMMON = {
    "prompt_template": "{}\n",
    "optim": "adamw_torch",
    "train_tokenizer": 384,
    "save_steps": 0,
    "logging_steps": 1000,
    "eval_overlap": "allow",
    "per_device_eval_batch_size": 512,
}


class Job(NamedTuple):
    """A policy of the comparison: what a worker needs to train and to measure it."""

    task: str
    size: Size
    seed: int
    root: Path  # folder of all runs of this size
    data: Path | None
    arm: str = START
    rate: float = START_RATE
    prompts: int = 0  # that the arm learns from, all stages together
    pilot: bool = False

    @property
    def folder(self) -> Path:
        own = "pilot" if self.pilot else f"{self.rate:g}"
        return self.root / self.task / f"seed-{self.seed}" / slug(self.arm) / own

    @property
    def start(self) -> Path:
        """The policy that every arm continues."""
        return self._replace(arm=START, rate=START_RATE, pilot=False).folder / "policy"


def warm_up() -> None:
    """Import what runs import, once per worker process. The garbage collector need not look at it in every run."""
    for module in ("deepspeed", "irlfast.methods", "irlfast.startup.prepare", "sklearn.linear_model"):
        importlib.import_module(module)
    gc.freeze()


class Steps(NamedTuple):
    start: int
    continued: int


def steps_of(job: Job) -> Steps:
    """Return the optimiser steps of the start and of SFT continued."""
    task, times = TASKS[job.task], job.size.times
    return Steps(max(2, round(task.start_steps * times)), max(2, round(task.steps * times)))


def batch_of(arm: Arm) -> int:
    """Return the prompts per optimiser step."""
    return ANSWERS // arm.answers


def slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def train_job(job: Job) -> dict[str, Any]:
    """Train the job's policy and measure it on the validation rows. Return the content of its ``result.json``."""
    path = job.folder / "result.json"
    if path.exists() and "failed" not in (earlier := read_json(path)):
        return earlier
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    result: dict[str, Any] = {"prompts": job.prompts, "rate": job.rate}
    with printed_to(job.folder / "train.txt"):
        begun = time.process_time()
        try:
            with counted() as counts:
                policy = trained(make_config(keys_of(job)))
            result |= {"counts": dict(counts), "seconds": time.process_time() - begun}
            shutil.copytree(policy, job.folder / "policy")
            if not job.pilot:
                result["validation"] = means(measured(job, "validation"))
        except Exception as error:  # the table shows whatever an arm raises
            if job.arm == START:
                raise
            result["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0]
    shutil.rmtree(job.folder / "run", ignore_errors=True)
    write_json(path, result)
    return result


def test_job(job: Job) -> dict[str, Any]:
    """Train the job's policy where it is not there yet, and measure it on the test rows. Return both results."""
    path, result = job.folder / "test.json", {}
    if not ARMS[job.arm].of:
        result = train_job(job)
    if not path.exists() and "failed" not in result:
        job.folder.mkdir(parents=True, exist_ok=True)
        with printed_to(job.folder / "test.txt"), counted() as counts:
            figures = measured(job, "test")
        write_json(path, {"figures": figures, "test_counts": dict(counts)})
    return {"rate": job.rate} | result | (read_json(path) if path.exists() else {})


def keys_of(job: Job) -> dict[str, Any]:
    """Return the keys of the job's training."""
    arm, steps = ARMS[job.arm], steps_of(job)
    if job.arm == START:
        return new_policy(job, "start", steps.start)
    if arm.from_scratch:
        keys = new_policy(job, "all", steps.start + steps.continued)
        return keys | {"train_tokenizer": None, "tokenizer_name_or_path": str(job.start)}
    keys = common(job, "pool") | {"model_name_or_path": str(job.start), "train_tokenizer": None}
    keys |= {"learning_rate": job.rate, "global_batch_size": batch_of(arm), "max_eval_samples": 2}
    pool = sum(1 for _ in read_jsonl(Path(keys["dataset_name"])))
    keys |= arm.keys | schedule(arm.keys, job.prompts, pool, batch_of(arm))
    compares = "feature_reward" in keys  # with the demonstration of each prompt
    if TASKS[job.task].unanswered and METHOD_FACTS[arm.keys["method"]].aligns and not compares:
        keys |= without_answers(job, keys)
    return keys


def without_answers(job: Job, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that replace a share ``UNANSWERED`` of a run's demonstrations by prompts without answers."""
    every, path = keys["max_train_samples"], job.folder / "prompts.jsonl"
    answered = max(keys["stages"], round((1 - UNANSWERED) * every))
    rows = (row for _, row in read_jsonl(files_of(job.task, job.seed, job.root)["prompts"]))
    write_jsonl(path, itertools.islice(rows, every - answered))
    learned = max(1, round((1 - UNANSWERED) * keys["inner_steps"]))
    own = {"max_train_samples": answered, "prompt_dataset_name": str(path)}
    return own | ({"reward_steps": learned} if "reward_steps" in keys else {})


def new_policy(job: Job, part: str, steps: int) -> dict[str, Any]:
    """Return the keys of SFT of a new policy on a part of the data."""
    path = job.folder / "config.json"
    model = json.loads((ROOT / "irlfast/demo/config.json").read_text())
    write_text(path, json.dumps(model | (TASKS[job.task].policy or job.size.policy)))
    own = {"config_name": str(path), "sft_steps": steps, "learning_rate": START_RATE, "max_eval_samples": 1}
    return common(job, part) | own | {"method": "sft", "global_batch_size": ANSWERS}


def common(job: Job, part: str) -> dict[str, Any]:
    """Return the keys that all runs of a task have."""
    files = files_of(job.task, job.seed, job.root)
    own = {"dataset_name": files[part], "eval_dataset_name": files["validation"], "output_dir": job.folder / "run"}
    return COMMON | TASKS[job.task].keys | {name: str(path) for name, path in own.items()} | {"seed": job.seed}


def schedule(keys: dict[str, Any], prompts: int, pool: int, batch: int) -> dict[str, Any]:
    """Return the keys that spread ``prompts`` over stages, rounds and steps of ``batch`` prompts.

    Every stage takes other prompts of the ``pool``, while it has enough. Else every stage takes the same prompts, and
    there are as many stages as the pool asks for. SFT before the stages, where ``keys`` ask for it, has as many steps.
    """
    if keys["method"] == "sft":
        steps = max(1, round(prompts / batch))
        return {"sft_steps": steps, "max_train_samples": min(pool, steps * batch)}
    stages, rounds = keys.get("stages", STAGES), keys.get("align_rounds", 1)
    if prompts > pool:
        stages = max(stages, math.ceil(prompts / pool))
    steps = max(1, round(prompts / stages / rounds / batch))
    own: dict[str, Any] = {"stages": stages, "inner_steps": steps}
    if METHOD_FACTS[keys["method"]].learns_reward and keys.get("reward_data") != "none":
        own["reward_steps"] = steps
    if keys.get("sft_steps"):
        own |= {"sft_steps": stages * rounds * steps, "sft_global_batch_size": ANSWERS}
    share = rounds * steps * batch
    if stages * share <= pool and keys["method"] not in ("spin", "t_spin"):
        return own | {"prompts_per_stage": "split", "max_train_samples": stages * share}
    return own | {"prompts_per_stage": "all", "max_train_samples": min(pool, share)}


def trained(config: Config) -> Path:
    """Do the phases of ``irlfast train``, without held-out figures and report. Return the last policy."""
    from irlfast.methods import METHODS
    from irlfast.methods.sft import sft
    from irlfast.startup.prepare import prepare

    run = prepare(config)
    *_, initial = [run.initial, *(policy for _, policy in sft(run, run.initial))]
    policy, train_stage = initial, METHODS[config.method].stage
    for stage in range(config.stages if train_stage else 0):
        policy = train_stage(run, stage, policy, policy if config.reference == "stage" else initial)
    return Path(policy)


def measured(job: Job, part: str) -> Figures:
    """Return the figures of the job's policy, or of the policy of the arm that it uses, on the rows of a part."""
    from irlfast.startup.prepare import prepare

    arm, folder, path = ARMS[job.arm], job.folder / part, files_of(job.task, job.seed, job.root)[part]
    policy = (job._replace(arm=arm.of) if arm.of else job).folder / "policy"
    shutil.rmtree(folder, ignore_errors=True)
    keys = common(job, "start") | {"method": "sft", "model_name_or_path": str(policy), "train_tokenizer": None}
    keys |= {"max_train_samples": 1, "eval_dataset_name": str(path), "max_eval_samples": None}
    run = prepare(make_config(keys | {"output_dir": str(folder)}))
    rows = [row for _, row in read_jsonl(path)]
    figures = JUDGES[TASKS[job.task].judge].figures(run, policy, rows, folder, arm.best_of)
    shutil.rmtree(folder)
    return figures


@contextlib.contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Write what is printed within the context to a file."""
    with path.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
