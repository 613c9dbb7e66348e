"""The charts of the page: Vega-Lite specifications with their data. ``charts.js`` draws them in the page's colours.

Channels are given as objects, and Altair does not check the specifications: its ways from a text to a channel and its
checks took most of the CPU time of a small run's report. Tests check each specification.
"""

import functools
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from irlfast.reports.files import column, interval, number
from irlfast.reports.metrics import TRAINING, HeldOutMetric, TrainingMetric, measured_in

POINTS = 240  # points per curve: about one for each 1.5 pixels of the panel
SIZE = {"width": 330, "height": 170}  # the page scales a chart to its place
WIDE = 900
SERIES = ("expert", "synthetic")
COLOUR = alt.Color("series:N", scale=alt.Scale(domain=SERIES), legend=None)
DASH = alt.StrokeDash("series:N", scale=alt.Scale(domain=SERIES, range=[[], [4, 3]]), legend=None)
Rows = list[dict[str, Any]]


class Chart(NamedTuple):
    title: str
    unit: str
    spec: dict[str, Any] | None  # None: nothing was measured
    series: tuple[str, ...] = ()  # the names of the lines, if there are several


@functools.cache
def vega() -> str:
    """Return the JavaScript of Vega, Vega-Lite and Vega-Embed, which draw the specifications."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def draw_curves(metrics: dict[str, np.ndarray]) -> list[Chart]:
    """Draw the training curves of ``metrics``: phase -> ``[steps, LOGGED]``."""
    charts = []
    for metric in TRAINING:
        spec = draw_curve(metric, metrics)
        if spec or not metric.optional:
            charts.append(Chart(metric.panel, metric.unit, spec, SERIES if len(metric.keys) > 1 else ()))
    return charts


def draw_curve(metric: TrainingMetric, metrics: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Draw a panel over the steps of the run. Each phase has its own line, because its reference is another policy."""
    if not any(np.isfinite(column(rows, *metric.keys)).any() for rows in metrics.values()):
        return None
    rows: Rows = []
    logged = sum(map(len, metrics.values()))
    for start, phase, values in phase_starts(metrics):
        points = max(8, round(POINTS * len(values) / logged))
        steps, _, _ = thin(start + values[:, 0], points)
        for key, series in zip(metric.keys, SERIES, strict=False):
            bands = zip(steps, *thin(column(values, key)[:, 0], points), strict=True)
            rows += [
                {"step": short(x), "mean": short(y), "low": short(low), "high": short(high)}
                | {"phase": phase, "series": series}
                for x, y, low, high in bands
            ]
    x = alt.X("step:Q", title=None, scale=alt.Scale(nice=False, domainMin=0))
    y = alt.Y("mean:Q", title=None, scale=alt.Scale(zero=False))
    tooltip = tooltips("phase:N", "step:Q", "mean:Q", "low:Q", "high:Q")
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=COLOUR, detail=alt.Detail("phase:N"))
    layers = [
        base.mark_area(style="band").encode(y=alt.Y("low:Q", title=None), y2=alt.Y2("high:Q")),
        *draw_stages(metrics),
        *draw_level(metric.level),
        base.mark_line(tooltip=True).encode(y=y, strokeDash=DASH, tooltip=tooltip),
    ]
    return alt.layer(*layers, **SIZE).to_dict(validate=False)


def draw_runs(runs: dict[str, dict[str, np.ndarray]]) -> list[Chart]:
    """Draw the training curves of several runs over each other; ``runs`` is name -> phase -> ``[steps, LOGGED]``."""
    charts = []
    for metric in TRAINING:
        rows: Rows = []
        for name, metrics in runs.items():
            logged = sum(map(len, metrics.values()))
            for start, phase, values in phase_starts(metrics):
                points = max(8, round(POINTS * len(values) / logged))
                steps, _, _ = thin(start + values[:, 0], points)
                means, _, _ = thin(column(values, metric.keys[0])[:, 0], points)
                drawn = [{"step": short(x), "mean": short(y)} for x, y in zip(steps, means, strict=True)]
                rows += [row | {"phase": phase, "run": name} for row in drawn]
        if any(row["mean"] is not None for row in rows):
            line = alt.Chart(alt.Data(values=rows)).mark_line(tooltip=True)
            encoded = line.encode(
                x=alt.X("step:Q", title=None, scale=alt.Scale(nice=False, domainMin=0)),
                y=alt.Y("mean:Q", title=None, scale=alt.Scale(zero=False)),
                color=alt.Color("run:N", sort=None, legend=alt.Legend(columns=2)),
                detail=alt.Detail("phase:N"),
                tooltip=tooltips("run:N", "phase:N", "step:Q", "mean:Q"),
            )
            side = " (expert)" if len(metric.keys) > 1 else ""
            spec = alt.layer(*draw_level(metric.level), encoded, **SIZE).to_dict(validate=False)
            charts.append(Chart(metric.panel + side, metric.unit, spec))
    return charts


def phase_starts(metrics: dict[str, np.ndarray]) -> list[tuple[float, str, np.ndarray]]:
    """Return the number of steps before each phase, its name and its rows."""
    lengths = [rows[-1, 0] for rows in metrics.values()]
    starts = np.cumsum([0, *lengths])[:-1]
    return list(zip(starts.tolist(), metrics, metrics.values(), strict=True))


def tooltips(*fields: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(field) for field in fields]


def draw_stages(metrics: dict[str, np.ndarray]) -> list[alt.Chart]:
    """Mark where each phase begins; name the phases that have room for their names."""
    steps = sum(rows[-1, 0] for rows in metrics.values())
    starts = [{"start": start} for start, _, _ in phase_starts(metrics) if start]
    names = [
        {"middle": start + rows[-1, 0] / 2, "name": phase.removeprefix("stage-")}
        for start, phase, rows in phase_starts(metrics)
        if rows[-1, 0] > 0.05 * steps
    ]
    rules = alt.Chart(alt.Data(values=starts)).mark_rule(style="stage").encode(x=alt.X("start:Q"))
    texts = alt.Chart(alt.Data(values=names)).mark_text(style="stage-name", dy=-7)
    return [rules, texts.encode(x=alt.X("middle:Q"), y=alt.value(0), text=alt.Text("name:N"))]


def draw_level(level: float | None) -> list[alt.Chart]:
    """Draw a horizontal line to compare with, if there is one."""
    if level is None:
        return []
    return [alt.Chart(alt.Data(values=[{"level": level}])).mark_rule(style="level").encode(y=alt.Y("level:Q"))]


def draw_zero() -> alt.Chart:
    """Draw a vertical line at 0."""
    return alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(style="level").encode(x=alt.X("zero:Q"))


def draw_held_out(evals: dict[str, dict], kept: str) -> list[Chart]:
    """Draw the held-out metrics over the phases; a full dot marks the kept policy."""
    shown = [metric for metric in measured_in(evals) if metric.panel]
    return [Chart(metric.panel, metric.unit, draw_phases(metric, evals, kept)) for metric in shown]


def draw_phases(metric: HeldOutMetric, evals: dict[str, dict], kept: str) -> dict[str, Any] | None:
    """Draw a held-out metric over the phases of the run, with its intervals where they were measured."""
    rows: Rows = []
    for phase, evaluation in evals.items():
        value = short(number(evaluation.get(metric.key)))
        low, high = (end if end is None else short(end) for end in interval(evaluation, metric.key))
        row = {"phase": phase.removeprefix("stage-"), "value": value, "low": low, "high": high}
        rows.append(row | {"kept": phase == kept})
    if all(row["value"] is None for row in rows):
        return None
    x = alt.X("phase:O", title=None, sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x)
    size = alt.SizeValue(30, condition={"test": "datum.kept", "value": 70})
    fill = alt.FillValue("var(--card)", condition={"test": "datum.kept", "value": "var(--expert)"})
    tooltip = tooltips("phase:N", "value:Q", "low:Q", "high:Q")
    line = base.mark_line().encode(y=y)
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title=None), y2=alt.Y2("high:Q"))
    dots = base.mark_point(opacity=1).encode(y=y, size=size, fill=fill, tooltip=tooltip)
    measured = any(row["low"] is not None for row in rows)
    layers = [*draw_level(metric.level), line, *([bars] if measured else []), dots]
    return alt.layer(*layers, **SIZE).to_dict(validate=False)


BINS = 24


def draw_log_ratios(log_ratios: dict[str, dict[str, np.ndarray]]) -> list[Chart]:
    """Draw histograms of the log-ratios of expert and synthetic answers, a chart per phase, on common bins.

    ``log_ratios`` is phase -> ``expert`` and ``synthetic``, in nats. The outermost bins have the most extreme
    percent of all values, too.
    """
    known = {
        phase: {name: values[np.isfinite(values)] for name, values in each.items()}
        for phase, each in log_ratios.items()
    }
    every = np.concatenate([np.zeros(0), *(values for each in known.values() for values in each.values())])
    if not len(every):
        return []
    low, high = np.percentile(every, (0.5, 99.5)).tolist()
    edges = np.linspace(low, high, BINS + 1) if low < high else np.array([low - 1, low + 1])
    charts = []
    for phase, each in known.items():
        rows: Rows = []
        for name, values in each.items():
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            rows += [
                {"from": short(low), "to": short(high), "answers": int(count), "series": name}
                for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
            ]
        bars = alt.Chart(alt.Data(values=rows)).mark_bar(opacity=0.55, binSpacing=0)
        encoded = bars.encode(
            x=alt.X("from:Q", title=None, scale=alt.Scale(zero=False, nice=False)),
            x2=alt.X2("to:Q"),
            y=alt.Y("answers:Q", title=None, stack=None),
            color=COLOUR,
            tooltip=tooltips("series:N", "from:Q", "to:Q", "answers:Q"),
        )
        spec = alt.layer(encoded, draw_zero(), **SIZE).to_dict(validate=False)
        means = ", ".join(f"{name} {values.mean():+.2f}" for name, values in each.items() if len(values))
        charts.append(Chart(phase, f"means: {means} nats", spec, SERIES))
    return charts


TIMELINE = ["sampling", "scoring", "forward", "backward", "other training", "evaluation"]


def draw_timeline(times: dict[str, list[Any]]) -> list[Chart]:
    """Draw where the time of the run went, stage after stage, from the times of ``files.split_time``.

    The rounds and rewards of a stage are drawn with their stage. Pauses between the starts of a run are left out.
    """
    stages: dict[str, np.ndarray] = {}
    for phase, each in times.items():
        known = np.nan_to_num([number(value) for value in each], nan=0.0, posinf=0.0)
        sampling, scoring, training, _, forward, backward, *_, evaluation = known
        parts = np.array([sampling, scoring, forward, backward, training - forward - backward, evaluation])
        stage = phase.partition("/")[0]
        stages[stage] = stages.get(stage, 0) + parts
    rows: Rows = []
    end = 0.0
    for stage, seconds in stages.items():
        for part, length in zip(TIMELINE, seconds, strict=True):
            if length > 0:
                rows.append({"stage": stage, "part": part, "seconds": short(length), "begin": short(end)})
                rows[-1]["end"] = short(end + length)
                end += length
    if not rows:
        return []
    colour = alt.Color("part:N", scale=alt.Scale(domain=TIMELINE))
    bars = alt.Chart(alt.Data(values=rows)).mark_bar(height=alt.RelativeBandSize(0.7))
    encoded = bars.encode(
        y=alt.Y("stage:O", title=None, sort=None),
        x=alt.X("begin:Q", title="seconds"),
        x2=alt.X2("end:Q"),
        color=colour,
        tooltip=tooltips("stage:N", "part:N", "seconds:Q"),
    )
    spec = encoded.properties(width=WIDE, height=alt.Step(22)).to_dict(validate=False)
    return [Chart("Timeline", "seconds, without pauses between starts", spec)]


def short(value: float) -> float | None:
    """Return a value with six digits, for the data of a chart; None for one that is not finite, which breaks a line."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


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
