"""The report's plots: small SVG panels that take the page's colours, so one serves light, dark and print."""

import io
import math
import re
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from irlfast.reports.files import number

POINTS = 240  # of a curve, about one for each 1.5 pixels of its panel

# Colours that matplotlib writes and the page replaces by CSS variables: one SVG serves light, dark and print.
INK, LINE, EXPERT, SYNTHETIC = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "var(--muted)", LINE: "var(--line)", EXPERT: "var(--expert)", SYNTHETIC: "var(--synthetic)"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "irlfast",
    "font.size": 8,
    "text.color": INK,
    "lines.linewidth": 1.4,
}

# Panels: title, unit, keys of metrics.jsonl or eval.json, a level to compare with.
CURVES: list[tuple[str, str, list[str], float | None]] = [
    ("Reward margin", "expert − synthetic, × β", ["rewards/margins"], 0.0),
    ("Reward accuracy", "share of pairs; line: chance", ["rewards/accuracies"], 0.5),
    ("Demonstration log-likelihood", "nats an answer", ["logps/chosen"], None),
    ("Loss", "", ["loss"], None),
    ("KL to the reference", "nats an answer, on the policy's samples", ["kl"], 0.0),
    ("Answer length", "tokens", ["length/chosen", "length/rejected"], None),
    ("Throughput", "tokens a second", ["tokens_per_second"], None),
]
HELD_OUT: list[tuple[str, str, str, float | None]] = [
    ("Exact match", "share of prompts", "exact_match", None),
    ("Demonstration nll", "nats an answer; lower is better", "nll", None),
    ("Demonstration nll per token", "nats; lower is better", "nll_per_token", None),
    ("Reward accuracy", "share of pairs; line: chance", "reward_accuracy", 0.5),
    ("Reward margin", "nats", "margin", 0.0),
    ("Answer length", "tokens", "answer_length", None),
]
SELDOM = ["KL to the reference"]  # no panel where a method does not log it
METRICS = [key for _, _, keys, _ in CURVES for key in keys]


class Panel(NamedTuple):
    title: str
    unit: str
    lines: int
    svg: Markup | None  # None: nothing was logged


def draw_curves(metrics: dict[str, np.ndarray]) -> list[Panel]:
    """Training curves of ``metrics``: phase -> [steps, 1 + METRICS] (``report_files.read_metrics``)."""
    with mpl.rc_context(STYLE):
        drawn = [Panel(title, unit, len(keys), draw_curve(keys, level, metrics)) for title, unit, keys, level in CURVES]
    return [panel for panel in drawn if panel.svg or panel.title not in SELDOM]


def draw_held_out(evals: dict[str, dict], kept: str) -> list[Panel]:
    """Held-out figures of every phase, the kept policy a full dot."""
    with mpl.rc_context(STYLE):
        return [Panel(title, unit, 1, draw_phases(key, level, evals, kept)) for title, unit, key, level in HELD_OUT]


def panel() -> tuple[Figure, Axes]:
    """An empty panel. All have one size and the same margins, so that the page can set them in a grid."""
    figure = Figure(figsize=(4.2, 2.3))
    axes = figure.add_axes((0.13, 0.11, 0.84, 0.79))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(nbins=5)
    axes.xaxis.set_major_formatter(tick)
    axes.yaxis.set_major_formatter(tick)
    return figure, axes


def tick(value: float, _: Any = None) -> str:
    scale, unit = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1, "")
    return f"{round(value / scale, 9):g}{unit}".replace("-", "−")


def inline(figure: Figure) -> Markup:
    """The figure as SVG for the inside of a page: it scales, takes the page's colours and names nothing outside."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", buffer.getvalue(), flags=re.S)
    svg = re.sub(r'^.*?<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)  # safe: numbers, and phase names out of a closed set


def thin(values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, 10th and 90th percentile of ``points`` runs of neighbouring values; the values themselves if so few.

    A value that is not finite breaks the line, thinned or not; missing ones break a thinned line if a run has no other.
    """
    if len(values) <= points:
        values = np.where(np.isfinite(values), values, np.nan)
        return values, values, values
    runs = [run[~np.isnan(run)] for run in np.array_split(values, points)]
    runs = [run if len(run) and np.isfinite(run).all() else np.array([np.nan]) for run in runs]
    low, high = np.array([np.percentile(run, (10, 90)) for run in runs]).T
    return np.array([run.mean() for run in runs]), low, high


def draw_curve(keys: list[str], level: float | None, metrics: dict[str, np.ndarray]) -> Markup | None:
    """A panel over the steps of the run. Each phase is a line of its own: its reference, so its zero, is another."""
    columns = [1 + METRICS.index(key) for key in keys]
    if not any(np.isfinite(rows[:, columns]).any() for rows in metrics.values()):
        return None
    figure, axes = panel()
    start, logged, steps = 0.0, sum(map(len, metrics.values())), sum(rows[-1, 0] for rows in metrics.values())
    for phase, rows in metrics.items():
        points = max(8, round(POINTS * len(rows) / logged))
        x, _, _ = thin(start + rows[:, 0], points)
        for column, colour, dash in zip(columns, (EXPERT, SYNTHETIC), ("-", "--"), strict=False):
            y, low, high = thin(rows[:, column], points)
            alone = np.isnan(np.r_[np.nan, y[:-1]]) & np.isnan(np.r_[y[1:], np.nan])  # no line leads there: a dot
            axes.plot(x, y, dash, color=colour)
            axes.plot(x[alone], y[alone], "o", color=colour, markersize=3)
            if len(rows) > points:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if start:
            axes.axvline(start, color=INK, linewidth=0.6, linestyle=(0, (2, 2)))
        if rows[-1, 0] > 0.05 * steps:  # there is room for its name
            where, name = start + rows[-1, 0] / 2, phase.removeprefix("stage-")
            axes.text(where, 1.03, name, transform=axes.get_xaxis_transform(), ha="center")
        start += rows[-1, 0]
    axes.set_xlim(0, steps)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=0.8)
    return inline(figure)


def draw_phases(key: str, level: float | None, evals: dict[str, dict], kept: str) -> Markup | None:
    values = np.array([number(evaluation.get(key)) for evaluation in evals.values()])
    values[np.isinf(values)] = np.nan
    if np.isnan(values).all():
        return None
    figure, axes = panel()
    x, full = np.arange(len(values)), np.array([phase == kept for phase in evals])
    axes.plot(x, values, color=EXPERT)
    axes.plot(x[~full], values[~full], "o", color=EXPERT, markersize=4, fillstyle="none")
    axes.plot(x[full], values[full], "o", color=EXPERT, markersize=6)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=0.8)
    every = math.ceil(len(x) / 12)
    axes.set_xticks(x[::every], [phase.removeprefix("stage-") for phase in evals][::every])
    axes.margins(x=0.08, y=0.15)
    return inline(figure)
