"""Does it learn? IRFT on real demonstrations against SFT, and against SFT continued for as many optimiser steps.

    python -m benchmarks.learning cmudict --data ../shared/data --seeds 0 1 2

runs, for every seed, ``configs/irft.yaml`` on the data, then two controls that continue its SFT policy by plain SFT for
the optimiser steps that IRFT took, on as many demonstrations a step: at IRFT's learning rate, and at SFT's own. Prints
mean ± standard deviation over seeds and writes ``benchmarks/results/DATE-learning-NAME.json``. Runs resume.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.conftest import ROOT, circumstances

COMMON = ["eval_dataset_name={data}/{name}_test.jsonl", "dataset_name={data}/{name}_train.jsonl"]
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
        "per_device_train_batch_size": 64,
    },
    "gsm8k": {
        "max_train_samples": 3000,
        "max_eval_samples": 300,
        "train_tokenizer": 2048,
        "max_prompt_length": 192,
        "max_length": 384,
        "max_new_tokens": 192,
        "sft_steps": 300,
        "sft_per_device_train_batch_size": 32,
        "prompts_per_stage": "split",
        "inner_epochs": 1,
        "learning_rate": 5e-5,
        "nll_weight": 0.5,
        "per_device_train_batch_size": 16,
    },
}
METRICS = ("exact_match", "nll", "reward_accuracy", "margin")


def train(output: Path, *keys: str) -> dict[str, dict]:
    """Run (or resume) a training; its held-out figures by phase."""
    command = [sys.executable, "-m", "irlfast.train", "configs/irft.yaml", f"output_dir={output}", *keys]
    subprocess.run(command, cwd=ROOT, check=True)
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(output.glob("*/eval.json"))}


def steps_of(output: Path) -> int:
    """Optimiser steps that all stages took together."""
    last = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        last[row["phase"]] = row["step"]
    return sum(step for phase, step in last.items() if phase.startswith("stage"))


def run_seed(folder: Path, seed: int, keys: list[str]) -> dict[str, dict]:
    """Figures of SFT, of every stage, and of both controls."""
    irft = folder / f"seed-{seed}"
    figures = train(irft, f"seed={seed}", *keys)
    config = yaml.safe_load((irft / "config.yaml").read_text())
    start = [
        "method=sft",
        "inner_epochs=null",
        "config_name=null",
        "train_tokenizer=null",
        f"model_name_or_path={irft / 'sft' / 'policy'}",
    ]
    size = [f"sft_per_device_train_batch_size={config['per_device_train_batch_size']}", f"sft_steps={steps_of(irft)}"]
    for label, rate, optim in (
        ("SFT continued, IRFT's learning rate", config["learning_rate"], config["optim"]),
        ("SFT continued, SFT's learning rate", config["sft_learning_rate"], config["sft_optim"]),
    ):
        control = folder / f"seed-{seed}-{'irft' if optim == config['optim'] else 'sft'}-rate"
        own = [f"sft_learning_rate={rate}", f"sft_optim={optim}", f"seed={seed}"]
        figures[label] = train(control, *keys, *start, *size, *own)["sft"]
    return figures


def summarise(seeds: list[dict[str, dict]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over seeds, by phase and metric."""
    table: dict[str, dict[str, list[float]]] = {}
    for phase in seeds[0]:
        table[phase] = {}
        for metric in METRICS:
            values = [figures[phase][metric] for figures in seeds if figures[phase][metric] is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                table[phase][metric] = [statistics.mean(values), spread]
    return table


def markdown(table: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| after | exact match | held-out NLL (nats) | reward accuracy |", "| --- | --- | --- | --- |"]
    for phase, metrics in table.items():
        cells = [
            "{:.3f} ± {:.3f}".format(*metrics[name]) if name in metrics else "–"
            for name in ("exact_match", "nll", "reward_accuracy")
        ]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME_train.jsonl and NAME_test.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    options = parser.parse_args()
    keys = [key.format(data=options.data.resolve(), name=options.task) for key in COMMON]
    keys += [f"{key}={value}" for key, value in TASKS[options.task].items()]
    folder = options.output.resolve() / options.task
    seeds = [run_seed(folder, seed, keys) for seed in options.seeds]
    table = summarise(seeds)
    print(markdown(table))
    result = {
        **circumstances(),
        "keys": TASKS[options.task],
        "seeds": dict(zip(map(str, options.seeds), seeds, strict=True)),
        "table": table,
    }
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-learning-{options.task}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
