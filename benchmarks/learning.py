"""Compare IRFT on real demonstrations with SFT, and with SFT continued for as many optimiser steps.

    python -m benchmarks.learning cmudict --data DATA --seeds 0 1 2

For every seed, the script runs ``configs/irft.yaml`` on the data. Two controls then continue its SFT policy by plain
SFT, for as many optimiser steps as IRFT took and with as many demonstrations per step: one at IRFT's learning rate, one
at SFT's. The script prints mean ± standard deviation over seeds and writes
``benchmarks/results/DATE-learning-NAME.json``. A stopped run resumes.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.conftest import write_result
from benchmarks.runs import markdown, parser, seeds_of, summarise, train

TASKS = {
    "cmudict": {
        "max_train_samples": 120000,
        "max_eval_samples": 2000,
        "max_prompt_length": 64,
        "max_length": 96,
        "max_new_tokens": 32,
        "sft_steps": 800,
        "prompts_per_stage": "split",
        "inner_epochs": 1,
        "learning_rate": 5e-5,
        "nll_weight": 0.5,
        "global_batch_size": 64,
    },
    "gsm8k": {
        "max_train_samples": 3000,
        "max_eval_samples": 300,
        "train_tokenizer": 2048,
        "max_prompt_length": 192,
        "max_length": 384,
        "max_new_tokens": 192,
        "sft_steps": 300,
        "sft_global_batch_size": 32,
        "prompts_per_stage": "split",
        "inner_epochs": 1,
        "learning_rate": 5e-5,
        "nll_weight": 0.5,
        "global_batch_size": 16,
    },
}
RECIPE = "configs/irft.yaml"
METRICS = ("exact_match", "nll", "reward_accuracy", "margin")
COLUMNS = {"exact_match": "exact match", "nll": "held-out NLL (nats)", "reward_accuracy": "reward accuracy"}


def count_steps(output: Path) -> int:
    """Return the optimiser steps of all stages together."""
    last = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        last[row["phase"]] = row["step"]
    return sum(step for phase, step in last.items() if phase.startswith("stage"))


def run_seed(folder: Path, seed: int, keys: dict[str, Any]) -> dict[str, dict]:
    """Return the metrics of SFT, of every stage, and of both controls."""
    irft = folder / f"seed-{seed}"
    figures = train(irft, RECIPE, **keys, seed=seed)
    config = yaml.safe_load((irft / "config.yaml").read_text())
    control = keys | {
        "method": "sft",
        "inner_epochs": "null",
        "config_name": "null",
        "train_tokenizer": "null",
        "model_name_or_path": irft / "sft" / "policy",
        "sft_global_batch_size": config["global_batch_size"],
        "sft_steps": count_steps(irft),
        "seed": seed,
    }
    for label, rate, optim in (
        ("SFT continued, IRFT's learning rate", config["learning_rate"], config["optim"]),
        ("SFT continued, SFT's learning rate", config["sft_learning_rate"], config["sft_optim"]),
    ):
        output = folder / f"seed-{seed}-{'irft' if optim == config['optim'] else 'sft'}-rate"
        figures[label] = train(output, RECIPE, **control | {"sft_learning_rate": rate, "sft_optim": optim})["sft"]
    return figures


def main() -> None:
    arguments = parser(__doc__, "learning")
    arguments.add_argument("task", choices=TASKS)
    arguments.add_argument("--data", type=Path, required=True, help="folder of NAME_train.jsonl and NAME_test.jsonl")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = arguments.parse_args()
    parts = {"dataset_name": "train", "eval_dataset_name": "test"}
    keys: dict[str, Any] = {key: options.data.resolve() / f"{options.task}_{part}.jsonl" for key, part in parts.items()}
    keys |= TASKS[options.task]
    folder = options.output.resolve() / options.task
    numbers = seeds_of(options)
    seeds = [run_seed(folder, seed, keys) for seed in numbers]
    table = summarise(seeds, METRICS)
    print(markdown(table, COLUMNS))
    result = {
        "keys": TASKS[options.task],
        "seeds": dict(zip(map(str, numbers), seeds, strict=True)),
        "table": table,
    }
    print(write_result(f"learning-{options.task}", result))


if __name__ == "__main__":
    main()
