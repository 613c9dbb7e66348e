"""Check whether methods that see only chosen answers learn preferences: figure 2 of arXiv 2405.17888, at a CPU's size.

    python -m benchmarks.preferences --data DATA

The methods learn from the chosen answers of 2,000 rows of HH harmless; the other rows are held out. Two metrics are
measured: the gap in log-probability between the chosen and the rejected answer, and the share of rows whose chosen
answer has the higher reward. Compared are SFT, IRFT and RFT with their implicit rewards (log-ratios to the SFT policy),
RFT's learned reward, and a reward model trained on the preferences. The script writes
``benchmarks/results/DATE-preferences-hh.json`` and a plot beside it. A stopped run resumes.
"""

from pathlib import Path

from benchmarks.conftest import write_result
from benchmarks.runs import parser, share, train

ROWS = 2000
COMMON = {
    "config_name": "irlfast/demo/config.json",
    "train_tokenizer": 2048,
    "max_prompt_length": 192,
    "max_length": 256,
    "max_new_tokens": 64,
    "global_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "sft_steps": 375,
    "sft_learning_rate": 2e-3,
    "sft_optim": "adamw_torch",
    "sft_global_batch_size": 16,
    "logging_steps": 25,
}
REWARD = {"reward_epochs": 2, "reward_learning_rate": 3e-4, "reward_optim": "adamw_torch"}
RUNS = {
    "IRFT": {"method": "irft", "stages": 2, "learning_rate": 5e-5, "beta": 0.1, "nll_weight": 0.2},
    "RFT": REWARD | {"method": "rft", "stages": 1, "learning_rate": 1e-5, "beta": 1.0, "num_generations": 2},
    "preference reward model": REWARD | {"method": "reward", "reward_data": "preference"},
}


def split(data: Path, folder: Path, rows: int) -> dict[str, Path]:
    """Write the first rows as training data and the others as held-out data."""
    lines = (data / "hh_harmless_test.jsonl").read_text().splitlines(keepends=True)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"dataset_name": lines[:rows], "eval_dataset_name": lines[rows:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    return {name: folder / f"{name}.jsonl" for name in parts}


def measure(folder: Path, data: Path, learned: int) -> dict[str, dict[str, float]]:
    """Return method -> ``gap`` in nats and ``accuracy``, if the method has them."""
    keys = COMMON | split(data, folder, learned)
    rows: dict[str, dict[str, float]] = {}
    for name, own in RUNS.items():
        if rows:
            share(folder / "IRFT", folder / name, "sft")
        figures = train(folder / name, **keys | own)
        rows.setdefault("SFT", {"gap": figures["sft"]["preference_gap"]})
        policies = [phase for phase in figures if phase.startswith("stage") and "/" not in phase]
        if policies:
            final = figures[max(policies)]
            rows[name] = {"gap": final["preference_gap"], "accuracy": final["preference_accuracy"]}
        rewards = [phase for phase in figures if phase.endswith("reward")]
        if rewards:
            label = name if own["method"] == "reward" else f"{name}, its reward"
            rows[label] = {"accuracy": figures[max(rewards)]["preference_accuracy"]}
            rows[label]["pairs"] = figures[max(rewards)]["preference_pairs"]
    return rows


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Draw two panels of bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"gap": "log π(chosen) − log π(rejected), nats", "accuracy": "reward higher for the chosen answer, share"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        bars = {label: row[name] for label, row in rows.items() if name in row}
        axes.barh(list(bars)[::-1], list(bars.values())[::-1])
        axes.set_title(title, fontsize=9)
    panels[1].axvline(0.5, color="grey", linewidth=0.8)
    figure.savefig(path)


def main() -> None:
    arguments = parser(__doc__, "preferences")
    arguments.add_argument("--data", type=Path, required=True, help="folder of hh_harmless_test.jsonl")
    options = arguments.parse_args()
    rows = measure(options.output.resolve(), options.data.resolve(), 64 if options.quick else ROWS)
    for name, row in rows.items():
        print(f"{name:26}" + "".join(f"  {key} {value:.3f}" for key, value in row.items()))
    result = {
        "keys": {"all": COMMON, **RUNS},
        "rows": rows,
    }
    path = write_result("preferences-hh", result)
    draw(rows, path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
