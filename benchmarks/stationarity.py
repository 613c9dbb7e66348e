"""Stationarity of IRFT over T and K (the convergence theorem of arXiv 2405.17888), on the exact test bed.

    python -m benchmarks.stationarity

ℓ(θ) is the experts' expected log-likelihood, whose gradient is known exactly. Algorithm 2 runs for T stages of K steps
with the learning rate 0.02/√(T·K). For each T and K, the script prints the mean of ‖∇ℓ‖² over all steps and three
seeds. It writes ``benchmarks/results/DATE-stationarity.json`` and a plot beside it.
"""

import argparse
import statistics

from benchmarks.conftest import write_result
from tests.helpers.stationarity import PAIRS, SCALE, squared_norms

STAGES, INNER_STEPS, SEEDS = (4, 16, 64), (1, 4, 16), (0, 1, 2)


def draw(rows: list[dict[str, float]], path) -> None:
    """Draw the mean squared norm over T·K, a line for each K, beside the rate 1/√(T·K)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for inner_steps in sorted({row["K"] for row in rows}):
        own = [row for row in rows if row["K"] == inner_steps]
        axes.plot(
            [row["T"] * row["K"] for row in own], [row["norm"] for row in own], marker="o", label=f"K = {inner_steps}"
        )
    steps = sorted({row["T"] * row["K"] for row in rows})
    axes.plot(steps, [rows[0]["norm"] * (steps[0] / count) ** 0.5 for count in steps], "k:", label="rate 1/√(T·K)")
    axes.set(xscale="log", yscale="log", xlabel="T·K, steps", ylabel="mean of ‖∇ℓ‖²")
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="few stages and steps, to check that everything runs")
    quick = arguments.parse_args().quick
    rows: list[dict[str, float]] = []
    for inner_steps in (1, 4) if quick else INNER_STEPS:
        for stages in (1, 4) if quick else STAGES:
            norms = [statistics.mean(squared_norms(stages, inner_steps, seed)) for seed in SEEDS]
            rows.append({"T": stages, "K": inner_steps, "norm": statistics.mean(norms)})
            print(f"K {inner_steps:3}  T {stages:3}  mean of the squared norm {rows[-1]['norm']:8.2f}", flush=True)
    path = write_result("stationarity", {"scale": SCALE, "pairs": PAIRS, "seeds": [*SEEDS], "rows": rows})
    draw(rows, path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
