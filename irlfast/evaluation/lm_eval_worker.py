"""The process that runs lm-evaluation-harness. It reads a JSON job from stdin and writes a JSON line per finished task.

    /path/to/env-with-lm-eval/bin/python irlfast/evaluation/lm_eval_worker.py < job.json > results.jsonl

It is run by path, in any interpreter that has lm-eval. It imports nothing of irlfast, which may not be installed there.
The job: ``{"model_args": {HFLM's arguments}, "batch_size": n, "include_path": folder of tasks or null,
"local_datasets": folder of local copies or null, "tasks": [{"name": task, "num_fewshot": shots or null}, …]}``.
A line of the output: ``{"task": name, "report": {lm-eval's results, versions, numbers of shots and samples, …},
"questions": {task: {"metric,filter": [the value of each question]}}}``.
"""

import ctypes
import json
import os
import signal
import sys

KEPT = (  # of what lm-eval reports about a task; the rest describes the machine and the tokenizer
    *("results", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "config"),
    *("git_hash", "lm_eval_version", "transformers_version", "higher_is_better"),
)


def main() -> None:
    end_with_parent()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # lm-eval prints to stdout
    job = json.load(sys.stdin)
    # Python puts this file's folder first into sys.path, where our modules hide others: statistics is one of Python's.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != here]
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    if job["local_datasets"]:
        os.chdir(
            job["local_datasets"]
        )  # where the library of datasets looks for a folder owner/name before it asks the hub
    manager = TaskManager(include_path=job["include_path"], metadata=dict(job["model_args"]))
    settings = {
        "batch_size": job["batch_size"],
        "device": "cuda:0",
    }  # as lm-eval's command; without a GPU it is the CPU
    model = get_model("hf").create_from_arg_obj(job["model_args"], settings)
    for task in job["tasks"]:
        report = simple_evaluate(
            model,
            tasks=[task["name"]],
            num_fewshot=task["num_fewshot"],
            batch_size=job["batch_size"],
            task_manager=manager,
            log_samples=True,
        )
        line = {
            "task": task["name"],
            "report": {name: report[name] for name in KEPT if name in report},
            "questions": {name: values_of(samples) for name, samples in report["samples"].items()},
        }
        print(json.dumps(line, default=handle_non_serializable), file=results, flush=True)


def values_of(samples: list) -> dict:
    """Return the value of each question, in the order of the questions, for each metric of a task."""
    values: dict = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return values


def end_with_parent() -> None:
    """Have Linux kill this process when its parent process is gone, however it ended."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    main()
