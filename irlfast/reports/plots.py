"""The report's plots: small SVG panels in the page's colours, for light mode, dark mode and print."""

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
from irlfast.reports.metrics import HELD_OUT, TRAINING, TRAINING_KEYS, HeldOutMetric, TrainingMetric

POINTS = 240  # points per curve: about one for each 1.5 pixels of the panel

# Colours that matplotlib writes, and the CSS variables of the page that replace them.
INK, LINE, EXPERT, SYNTHETIC = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "var(--muted)", LINE: "var(--line)", EXPERT: "var(--expert)", SYNTHETIC: "var(--synthetic)"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "irlfast",
    "font.size": 8,
    "text.color": INK,
    "lines.linewidth": 1.4,
}


class Panel(NamedTuple):
    title: str
    unit: str
    lines: int
    svg: Markup | None  # None: nothing was logged


def draw_curves(metrics: dict[str, np.ndarray]) -> list[Panel]:
    """Draw the training curves of ``metrics``: phase -> ``[steps, 1 + TRAINING_KEYS]`` (``files.read_metrics``)."""
    panels = []
    with mpl.rc_context(STYLE):
        for metric in TRAINING:
            svg = draw_curve(metric, metrics)
            if svg or not metric.optional:
                panels.append(Panel(metric.panel, metric.unit, len(metric.keys), svg))
    return panels


def draw_held_out(evals: dict[str, dict], kept: str) -> list[Panel]:
    """Draw the held-out metrics over the phases; a full dot marks the kept policy."""
    with mpl.rc_context(STYLE):
        shown = [metric for metric in HELD_OUT if metric.panel]
        return [Panel(metric.panel, metric.unit, 1, draw_phases(metric, evals, kept)) for metric in shown]


def empty_panel() -> tuple[Figure, Axes]:
    """Make an empty panel. All panels have one size and the same margins, so that the page can set them in a grid."""
    figure = Figure(figsize=(4.2, 2.3))
    axes = figure.add_axes((0.13, 0.11, 0.84, 0.79))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(nbins=5)
    axes.xaxis.set_major_formatter(tick_label)
    axes.yaxis.set_major_formatter(tick_label)
    return figure, axes


def tick_label(value: float, _: Any = None) -> str:
    scale, unit = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1, "")
    return f"{round(value / scale, 9):g}{unit}".replace("-", "−")


def to_svg(figure: Figure) -> Markup:
    """Return the figure as SVG inside the page: it scales, has the page's colours and loads nothing from outside."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", buffer.getvalue(), flags=re.S)
    svg = re.sub(r'^.*?<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)  # safe: the SVG holds numbers, and phase names from a closed set


def thin(values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean, the 10th and the 90th percentile of ``points`` runs of neighbouring values.

    At most ``points`` values stay as they are. A value that is not finite breaks the line. A missing value breaks a
    thinned line only if its run has no other value.
    """
    if len(values) <= points:
        values = np.where(np.isfinite(values), values, np.nan)
        return values, values, values
    runs = [run[~np.isnan(run)] for run in np.array_split(values, points)]
    runs = [run if len(run) and np.isfinite(run).all() else np.array([np.nan]) for run in runs]
    low, high = np.array([np.percentile(run, (10, 90)) for run in runs]).T
    return np.array([run.mean() for run in runs]), low, high


def draw_curve(metric: TrainingMetric, metrics: dict[str, np.ndarray]) -> Markup | None:
    """Draw a panel over the steps of the run. Each phase has its own line, because its reference is another policy."""
    columns = [1 + TRAINING_KEYS.index(key) for key in metric.keys]
    if not any(np.isfinite(rows[:, columns]).any() for rows in metrics.values()):
        return None
    figure, axes = empty_panel()
    start, logged, steps = 0.0, sum(map(len, metrics.values())), sum(rows[-1, 0] for rows in metrics.values())
    for phase, rows in metrics.items():
        points = max(8, round(POINTS * len(rows) / logged))
        x, _, _ = thin(start + rows[:, 0], points)
        for column, colour, dash in zip(columns, (EXPERT, SYNTHETIC), ("-", "--"), strict=False):
            y, low, high = thin(rows[:, column], points)
            alone = np.isnan(np.r_[np.nan, y[:-1]]) & np.isnan(np.r_[y[1:], np.nan])  # without neighbours: a dot
            axes.plot(x, y, dash, color=colour)
            axes.plot(x[alone], y[alone], "o", color=colour, markersize=3)
            if len(rows) > points:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if start:
            axes.axvline(start, color=INK, linewidth=0.6, linestyle=(0, (2, 2)))
        if rows[-1, 0] > 0.05 * steps:  # there is room for the name of the phase
            middle, name = start + rows[-1, 0] / 2, phase.removeprefix("stage-")
            axes.text(middle, 1.03, name, transform=axes.get_xaxis_transform(), ha="center")
        start += rows[-1, 0]
    axes.set_xlim(0, steps)
    if metric.level is not None:
        axes.axhline(metric.level, color=INK, linewidth=0.8)
    return to_svg(figure)


def draw_phases(metric: HeldOutMetric, evals: dict[str, dict], kept: str) -> Markup | None:
    """Draw a held-out metric over the phases of the run."""
    values = np.array([number(evaluation.get(metric.key)) for evaluation in evals.values()])
    values[np.isinf(values)] = np.nan
    if np.isnan(values).all():
        return None
    figure, axes = empty_panel()
    x, full = np.arange(len(values)), np.array([phase == kept for phase in evals])
    axes.plot(x, values, color=EXPERT)
    axes.plot(x[~full], values[~full], "o", color=EXPERT, markersize=4, fillstyle="none")
    axes.plot(x[full], values[full], "o", color=EXPERT, markersize=6)
    if metric.level is not None:
        axes.axhline(metric.level, color=INK, linewidth=0.8)
    every = math.ceil(len(x) / 12)
    axes.set_xticks(x[::every], [phase.removeprefix("stage-") for phase in evals][::every])
    axes.margins(x=0.08, y=0.15)
    return to_svg(figure)
