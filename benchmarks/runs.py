"""Helpers of the benchmarks of whole runs: train by the real command, and make tables over seeds."""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.conftest import ROOT
from irlfast.common.artefacts import keep_text
from irlfast.config import dump, load_config

Figures = dict[str, dict]  # phase or method -> metrics

# The largest values of keys with --quick, which always sets the first two. A model from a config is the tests' one.
SMALL = {"max_train_samples": 24, "max_eval_samples": 8}
SMALL |= {"max_new_tokens": 8, "sft_steps": 2, "reward_steps": 2, "inner_steps": 2, "stages": 2}


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("runs") / output, help="folder of the runs")
    arguments.add_argument("--quick", action="store_true", help="a few rows and steps, to check that everything runs")
    return arguments


def seeds_of(options: argparse.Namespace) -> list[int]:
    return options.seeds[:1] if options.quick else options.seeds


def start(arguments: list[str]) -> None:
    """Run ``python ARGUMENTS`` from the repository's root."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def settings(keys: dict[str, object]) -> list[str]:
    """Return the keys as arguments of a command."""
    if "--quick" in sys.argv:
        always = {name: SMALL[name] for name in ("max_train_samples", "max_eval_samples")}
        keys = always | keys
        keys |= {name: min(keys[name], limit) for name, limit in SMALL.items() if isinstance(keys.get(name), int)}
        if keys.get("config_name") not in (None, "null"):
            keys["config_name"] = ROOT / "tests/helpers/small.json"
    return [f"{name}={value}" for name, value in keys.items()]


def train(output: Path, *arguments: str, **keys: object) -> Figures:
    """Run or resume a training, and return its held-out metrics by phase, reward models included."""
    words = [*arguments, *settings(keys | {"output_dir": output})]
    if output.exists() and not (output / "config.yaml").exists():  # it has parts of another run, by share()
        keep_text(output / "config.yaml", dump(load_config(words)[0]))
    start(["-m", "irlfast.train", *words])
    paths = [*output.glob("*/eval.json"), *output.glob("*/reward/eval.json")]
    return {str(path.parent.relative_to(output)): json.loads(path.read_text()) for path in sorted(paths)}


def share(source: Path, target: Path, part: str) -> None:
    """Copy a part of one run to another run, which would compute the same part again."""
    if not (target / part).exists():
        shutil.copytree(source / part, target / part)


def summarise(seeds: list[Figures], metrics: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Return mean and standard deviation over seeds: phase or method -> metric -> both. Missing values are left out."""
    table: dict[str, dict[str, list[float]]] = {}
    for name in seeds[0]:
        table[name] = {}
        for metric in metrics:
            values = [figures[name][metric] for figures in seeds if figures[name].get(metric) is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                table[name][metric] = [statistics.mean(values), spread]
    return table


def markdown(table: dict[str, dict[str, list[float]]], columns: dict[str, str]) -> str:
    """Return a table as Markdown; ``columns`` maps metrics to the heads of the columns."""
    lines = [f"| | {' | '.join(columns.values())} |", "| --- |" + " --- |" * len(columns)]
    for name, metrics in table.items():
        cells = ["{:.3f} ± {:.3f}".format(*metrics[metric]) if metric in metrics else "–" for metric in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
