"""Draw a benchmark result: time and memory of every peer, and their growth with N and V.

    python -m benchmarks.plot [RESULT.json]

The default is the newest full run of the pair loss in ``benchmarks/results/``. The script writes RESULT-bars.svg and
RESULT-curves.svg there, or RESULT-gain.svg for a result of test_sharing.py.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "irlfast", "font.size": 9, "axes.spines.right": False})
matplotlib.rcParams.update({"axes.spines.top": False, "axes.axisbelow": True})

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks import conftest  # noqa: E402

OURS, PEER, FLOOR = "#c2410c", "#94a3b8", "#1e293b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, help="a file that `pytest benchmarks/` wrote")
    parser.add_argument("--quick", action="store_true", help="mark the names of the plots as quick")
    options = parser.parse_args()
    path = options.result or newest()
    results = json.loads(path.read_text())
    for name, draw in (("bars", bars), ("curves", curves), ("gain", gain)):
        figure = draw(results)
        if figure is not None:
            target = conftest.RESULTS_FOLDER / f"{path.stem}-{name}{'-quick' if options.quick else ''}.svg"
            target.parent.mkdir(exist_ok=True)
            figure.savefig(target, metadata={"Date": None})
            print(target)


def newest() -> Path:
    results = conftest.ROOT / "benchmarks" / "results"
    full = sorted(path for path in results.glob("*-pair-loss-*.json") if not path.stem.endswith(("-quick", "-partial")))
    if not full:
        raise SystemExit(f"no result of a full run in {results}: run `pytest benchmarks/` first, or name a file")
    return full[-1]


def colour(row: str) -> str:
    return OURS if row.startswith("irlfast") else FLOOR if row.startswith("bare products") else PEER


def subtitle(results: dict[str, Any]) -> str:
    where = f"{results['threads']} CPU thread(s), " if results["kind"] == "cpu" else ""
    return f"{results['device']}, {where}torch {results['versions']['torch']}, {results['date'][:10]}"


# ---------------------------------------------------------------- bars


def bars(results: dict[str, Any]) -> Any:
    """Draw two panels per case: time, and extra memory if it was measured."""
    cases = [case for name, case in results.get("cases", {}).items() if not name.startswith("curve")]
    if not cases:
        return None
    heights = [1 + 0.24 * len(timed(case)) for case in cases]
    figure, axes = plt.subplots(
        len(cases),
        2,
        figsize=(10, sum(heights) + 0.5),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights, "width_ratios": [3, 2]},
    )
    figure.suptitle(f"Pair loss, forward + backward: {subtitle(results)}")
    for case, (left, right) in zip(cases, axes, strict=True):
        rows = sorted(timed(case).items(), key=lambda item: -item[1]["seconds"])
        names = [row for row, _ in rows]
        low, middle, high = ([1000 * result[key] for _, result in rows] for key in ("min", "seconds", "max"))
        below = [m - least for m, least in zip(middle, low, strict=True)]
        above = [most - m for m, most in zip(middle, high, strict=True)]
        left.barh(names, middle, xerr=[below, above], color=[colour(row) for row in names], ecolor="#475569")
        left.set_title(shape(case), loc="left", fontsize=9)
        left.set_xlabel("ms, median; lines: least to most")
        label(left, range(len(rows)), middle, high)
        memory = [(place, result["extra_mib"]) for place, (_, result) in enumerate(rows) if result.get("extra_mib")]
        right.set_visible(bool(memory))
        if memory:
            places, used = zip(*memory, strict=True)
            right.barh(places, used, color=[colour(rows[place][0]) for place in places])
            right.set(xlabel="peak extra MiB; dotted: the gradients alone", ylim=left.get_ylim(), yticks=[])
            label(right, places, used, used)
            right.axvline(case["gradient_mib"], color=FLOOR, linewidth=0.8, linestyle=":")
    return figure


def timed(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row: result for row, result in case["rows"].items() if "seconds" in result}


def shape(case: dict[str, Any]) -> str:
    size = f"{case['pairs']} pairs × 2 × {case['tokens']}, H {case['hidden']}, V {case['vocabulary']}"
    notes = [case["dtype"], *["trained"] * case["trained"], *["half masked"] * case["half"]]
    return f"{case['name']}: {size}, {', '.join(notes)}"


def label(axes: Axes, places: Iterable[int], values: Sequence[float], ends: Sequence[float]) -> None:
    axes.set_xlim(0, 1.12 * max(ends))
    for place, value, end in zip(places, values, ends, strict=True):
        axes.text(end, place, f" {value:.3g}" if value < 1000 else f" {value:.0f}", va="center", fontsize=8)


# ---------------------------------------------------------------- curves


def curves(results: dict[str, Any]) -> Any:
    """Draw time and extra memory over N and over V, on logarithmic axes."""
    base = results.get("cases", {}).get("curve")
    if base is None:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    figure.suptitle(f"Pair loss over N and V: {subtitle(results)}")
    for column, (axis, fixed) in enumerate((("N", f"V {base['vocabulary']}"), ("V", f"N {tokens(base)}"))):
        cases = [base, *(case for name, case in results["cases"].items() if name.startswith(f"curve-{axis}"))]
        sizes = [tokens(case) if axis == "N" else case["vocabulary"] for case in cases]
        for line, (key, scale, unit) in enumerate((("seconds", 1000, "ms"), ("extra_mib", 1, "peak extra MiB"))):
            panel = axes[line][column]
            for row in base["rows"]:
                values = [case["rows"].get(row, {}).get(key) for case in cases]
                if None in values:
                    continue
                ours = row.startswith("irlfast")
                style = {"color": colour(row) if ours or row == "bare products" else None, "linewidth": 1 + ours}
                panel.plot(sizes, [scale * value for value in values], marker="o", markersize=4, label=row, **style)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            for ticks in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                ticks("{x:g}")
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.set_xlabel(f"{axis} ({fixed}, H {base['hidden']}, {base['dtype']})")
            panel.set_ylabel(unit)
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend(frameon=False, fontsize=8)
    return figure


def tokens(case: dict[str, Any]) -> int:
    return 2 * case["pairs"] * case["tokens"]


# ---------------------------------------------------------------- shared prompts


def gain(results: dict[str, Any]) -> Any:
    """Draw answer tokens per second with and without shared prompts, and their ratio, measured and counted."""
    if "sharing" not in results:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(f"Shared prompts, forward + backward: {subtitle(results)}")
    for number, shade in zip((1, 2, 4), ("#fdba74", "#f97316", OURS), strict=True):
        points = [point for point in results["sharing"] if point["n"] == number]
        x = [point["ratio"] for point in points]
        for layout, dash in (("shared", "-"), ("separate", "--")):
            rates = [point["rates"][layout] for point in points]
            left.plot(x, rates, dash, color=shade, marker="o", markersize=4, label=f"{layout}, n = {number}")
        right.plot(x, [point["gain"] for point in points], "o", color=shade, label=f"measured, n = {number}")
        right.plot(x, [point["predicted"] for point in points], color=shade, linewidth=1)
    left.set_ylabel("answer tokens per second")
    right.set_ylabel("times as fast; lines: the operation count")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [f"{ratio:g}" for ratio in x])
        panel.set_xlabel("length of the prompt / length of an answer; n synthetic answers")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
