"""The section of docs/results.md that compares the methods, made from the newest results of all tasks."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import conftest
from benchmarks.protocol.arms import CONTINUED
from benchmarks.protocol.tasks import TASKS

Result = dict[str, Any]
PAGE = conftest.ROOT / "docs" / "results.md"
BEGIN, END = "<!-- methods: made by benchmarks/protocol/page.py -->", "<!-- /methods -->"


def write_section(page: Path = PAGE) -> None:
    """Replace the section between the page's two marks, and draw its figure."""
    results = newest(conftest.RESULTS_FOLDER)
    if not results:
        return
    figure = conftest.RESULTS_FOLDER / f"{max(result['date'] for result in results.values())[:10]}-methods.svg"
    draw(results, figure)
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    link = f"../benchmarks/results/{figure.name}"
    parts = [BEGIN, summary(results), f"![Gain over SFT continued, by method and task]({link})"]
    parts += [section(name, result) for name, result in results.items()]
    page.write_text(before + "\n\n".join(parts) + f"\n\n{END}" + after)


def newest(folder: Path) -> dict[str, Result]:
    """Return task -> its newest whole result, in the order of the tasks."""
    paths = {name: sorted(folder.glob(f"*-methods-{name}.json")) for name in TASKS}
    read = {name: {**json.loads(own[-1].read_text()), "file": own[-1].name} for name, own in paths.items() if own}
    return {name: result for name, result in read.items() if CONTINUED in result["arms"]}


def summary(results: dict[str, Result]) -> str:
    """Return how the arms were compared, and the number of tasks on which each arm beat or lost to SFT continued."""
    rows = [each for result in results.values() for each in result["arms"].items()]
    names = dict.fromkeys(name for name, row in rows if verdict(row))
    lines = ["| method | better than SFT continued | worse | no difference shown |", "| --- | --- | --- | --- |"]
    for name in names:
        verdicts = {task: verdict(result["arms"].get(name, {})) for task, result in results.items()}
        cells = [", ".join(f"`{task}`" for task, own in verdicts.items() if own == each) for each in VERDICTS]
        lines.append(f"| {name} | {' | '.join(cell or '–' for cell in cells)} |")
    return "\n".join(lines)


VERDICTS = ("better", "worse", "no difference")


def verdict(row: Result) -> str | None:
    """Return whether an arm beat SFT continued, by its p-value after Holm's correction; None without one."""
    gain = row.get("gain", {})
    if gain.get("p_holm") is None:
        return None
    return "no difference" if gain["p_holm"] > 0.05 else "better" if gain["mean"] > 0 else "worse"


def section(name: str, result: Result) -> str:
    """Return the heading, the claim and the table of a task."""
    task, judge = result["task"], result["judge"]
    base, columns = result["arms"][CONTINUED], judge["columns"]
    seeds = len(base["seeds"])
    heads = ["", *columns.values(), f"gain in {columns[judge['main']]}", "p (Holm)"]
    heads += ["rate", "prompts", "trained", "sampled", "scored", "budget", "core seconds"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    budget = mean(base, "budget")
    for arm, row in result["arms"].items():
        if "failed" in row:
            lines.append(f"| {arm} | {' | '.join(['–'] * (len(heads) - 2))} | failed: {row['failed']} |")
            continue
        cells = [spread([own["figures"][column] for own in row["seeds"].values()]) for column in columns]
        cells += [interval(row.get("gain")), shown(row.get("gain", {}).get("p_holm"))]
        cells += [f"{row['rate']:g}", f"{row['prompts']:,}" if row["prompts"] else "–"]
        tokens = [mean(row, "counts", kind) for kind in result["prices"]]
        cells += [f"{count / 1000:,.0f}k" if count else "–" for count in tokens]
        cells += [f"{mean(row, 'budget') / budget:.2f}", f"{mean(row, 'seconds'):.1f}"]
        better = verdict(row) == "better"
        lines.append(f"| {f'**{arm}**' if better else arm} | {' | '.join(cells)} |")
    arms = "" if seeds > 1 else " One seed gives no interval."
    return "\n\n".join(
        [
            f"### `{name}`: {task['title']}",
            f"The claim: {task['claim']}",
            f"{seeds} seeds; figures are mean ± standard deviation over seeds.{arms}",
            "\n".join(lines),
            f"[All figures](../benchmarks/results/{result['file']}); {result['device']}, {result['date'][:10]}.",
        ]
    )


def mean(row: Result, *path: str) -> float:
    """Return the mean over seeds of a number at a path in each seed's record; 0 where it has none."""
    values = []
    for own in row["seeds"].values():
        for key in path:
            own = own.get(key) or (0 if key == path[-1] else {})
        values.append(own)
    return float(np.mean(values))


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def interval(gain: Result | None) -> str:
    if gain is None:
        return "–"
    return f"{gain['mean']:+.3f}" + (f" [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain["low"] is not None else "")


def shown(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def draw(results: dict[str, Result], path: Path) -> None:
    """Draw the gain over SFT continued with its interval: a panel per task, a row per method."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(n for result in results.values() for n, row in result["arms"].items() if "gain" in row))
    colours = {"better": "tab:green", "worse": "tab:red", "no difference": "tab:grey", None: "tab:grey"}
    across = min(5, len(results))
    down = -(-len(results) // across)
    figure = Figure(figsize=(2.2 + 2.1 * across, 0.8 + (0.5 + 0.2 * len(names)) * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    for axes, (task, result) in zip(panels, results.items(), strict=False):
        for place, name in enumerate(names):
            row = result["arms"].get(name, {})
            if "gain" not in row:
                continue
            gain = row["gain"]
            ends = [gain[key] if gain[key] is not None else gain["mean"] for key in ("low", "high")]
            axes.plot(ends, [place, place], color=colours[verdict(row)], linewidth=1.2)
            axes.plot(gain["mean"], place, "o", color=colours[verdict(row)], markersize=3)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_title(task, fontsize=8)
        axes.set_xlabel(result["judge"]["columns"][result["judge"]["main"]], fontsize=7)
        axes.tick_params(labelsize=6)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(path)
