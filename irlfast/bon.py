"""Best of N: ``irlfast bon [CONFIG.yaml] key=value...``, with the keys of training. It resumes as a run does.

    irlfast bon model_name_or_path=runs/rft/sft/policy \\
        reward_model_name_or_path=runs/rft/stage-00/reward/model dataset_name=prompts.jsonl \\
        num_generations=16 output_dir=runs/bon

The policy answers every prompt of the dataset ``num_generations`` times. The answer with the highest reward goes to
``best.jsonl``, which training reads as it is. The rows of the dataset need no answers.

``curve.json`` has the expected result of best of n for n = 1, 2, 4, … N, from the same answers: the mean over all
choices of n of the N answers, which is exact without more sampling. It also has a bound of the KL to the policy,
log n − (n − 1)/n (arXiv 2401.01879).
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from irlfast.common import dist, watchdog
from irlfast.common.artefacts import intact, keep, keep_json, keep_jsonl
from irlfast.common.command import run_command, writing_to
from irlfast.common.files import InputError, home_path
from irlfast.common.messages import log
from irlfast.common.tensors import save_tensors
from irlfast.config import Config, load_config
from irlfast.data.store import Example
from irlfast.engine.process_group import destroy_process_group
from irlfast.evaluation.curves import best_of_each, kl_bound
from irlfast.evaluation.measure import text
from irlfast.methods.stages import sampling
from irlfast.runs.run import Run
from irlfast.sampling.generation import prompt_of, sample_groups
from irlfast.sampling.reward_texts import row_of, text_of
from irlfast.sampling.rewards import complete, rewards_of
from irlfast.startup.prepare import prepare

ANSWERS = 2**17  # answers in memory at a time


def best_of_n(config: Config) -> None:
    """Sample, score and choose for one part of the prompts at a time, then compute the curve."""
    if config.prompt_dataset_name:
        raise InputError("prompt_dataset_name: best of n answers the prompts of dataset_name; expected these alone")
    given: dict[str, Any] = {"stages": 1, "align_rounds": 1, "push_to_hub": False}
    run = prepare(dataclasses.replace(config, **given), prompts_only=True)
    size = max(1, ANSWERS // config.num_generations)
    parts = [run.train[start : start + size] for start in range(0, len(run.train), size)]
    folders = [run.output / f"part-{number:05d}" for number in range(len(parts))]
    for number, (examples, folder) in enumerate(zip(parts, folders, strict=True)):
        if not dist.on_main(is_done, folder):
            choose_best(run, number, examples, folder)
    if dist.is_main():
        best = b"".join((folder / "best.jsonl").read_bytes() for folder in folders)
        keep(run.output / "best.jsonl", lambda path: path.write_bytes(best))
        scores = [load_file(folder / "scores.safetensors") for folder in folders]
        names = ("rewards", "exact", "known")
        curve = curve_of(*(np.concatenate([part[name] for part in scores]) for name in names))
        keep_json(run.output / "curve.json", curve)
        show(curve)
        log(f"best of {config.num_generations}: {run.output / 'best.jsonl'}")
    destroy_process_group()


def is_done(folder: Path) -> bool:
    return intact(folder / "best.jsonl") and intact(folder / "scores.safetensors")


def choose_best(run: Run, number: int, examples: Sequence[Example], folder: Path) -> None:
    """Sample n answers to each prompt of a part, and write the scores of all and the best of each."""
    config, n = run.config, run.config.num_generations
    drawn = sampling(config, 0, number)
    groups = sample_groups(run, run.initial, examples, n, folder / "rollouts", drawn)
    scored = rewards_of(run, [], groups, folder, run.output / "reward_scales.json").view(-1, n)  # [P, n]
    kept = complete(scored)
    examples, groups, rewards = [examples[i] for i in kept], [groups[i] for i in kept], scored[kept].numpy()
    if dist.is_main():
        known = np.array([len(x.answer_ids) > 0 for x in examples])
        exact = np.array([[a == x.answer_ids for a in g.answers] for x, g in zip(examples, groups, strict=True)])
        scores = {"rewards": rewards.astype(np.float32), "exact": exact & known[:, None], "known": known}
        keep(folder / "scores.safetensors", lambda path: save_tensors(scores, path))
        best = zip(examples, groups, rewards, rewards.argmax(1), strict=True)
        keep_jsonl(
            folder / "best.jsonl",
            (best_row(run, x, group.answers[chosen], values[chosen].item()) for x, group, values, chosen in best),
        )
    dist.barrier()


def best_row(run: Run, example: Example, answer: Sequence[int], reward: float) -> dict[str, Any]:
    """Return a prompt with its best answer, as the model's text and as ``messages``, which training reads.

    Earlier answers in ``messages`` have the weight 0: they are context.
    """
    row = row_of(run, example.row)
    before = [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in row["messages"]]
    best = {
        "messages": [*before, {"role": "assistant", "content": text_of(run, answer)}],
        "prompt": prompt_of(run, example),
        "answer": text_of(run, answer).strip(),
        "answer_ids": [*answer],
        "reward": reward,
    }
    best |= {"tools": row["tools"]} if row.get("tools") else {}
    return best | ({"expert": text(run, example.answer_ids)} if example.answer_ids else {})


def curve_of(rewards: np.ndarray, exact: np.ndarray, known: np.ndarray) -> list[dict[str, Any]]:
    """Return the expected reward and exact match of the best of n = 1, 2, 4, … N answers.

    ``rewards`` and ``exact`` are those of all answers, ``[P, N]``. The exact match is over the prompts with a ``known``
    answer ``[P]``; None where no prompt has one.
    """
    both = zip(best_of_each(rewards, rewards), best_of_each(rewards, exact), strict=True)
    return [
        {
            "n": n,
            "kl_bound": kl_bound(n),
            "reward": float(reward.mean()),
            "exact_match": float(right[known].mean()) if known.any() else None,
        }
        for (n, reward), (_, right) in both
    ]


def show(curve: list[dict[str, Any]]) -> None:
    table = Table("best of", "KL at most (nats)", "reward", "exact match")
    for row in curve:
        cells = [row[name] for name in ("kl_bound", "reward", "exact_match")]
        table.add_row(str(row["n"]), *("–" if cell is None else f"{cell:.3f}" for cell in cells))
    Console(width=100).print(table)


def command() -> None:
    config, _ = load_config([*sys.argv[1:], "method=rft", "reward_data=none", "align=bon"], "irlfast bon")
    with writing_to(config.output_dir, "output_dir"):
        watchdog.start(home_path(config.output_dir), config.stall_timeout)
        best_of_n(config)


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
