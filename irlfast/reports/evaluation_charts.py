"""The charts of an evaluation's page, from ``figures.json``."""

from typing import Any

import altair as alt

from irlfast.evaluation.figures import figure_of
from irlfast.reports.charts import SIZE, Chart, Rows, draw_zero, short, tooltips
from irlfast.reports.files import mapping, number

Curves = dict[str, list[dict[str, Any]]]  # model -> the points of its curve
SHOWN = ("better", "worse", "not shown to be either")
SHOWN_COLOURS = ("var(--good)", "var(--bad)", "var(--muted)")


def draw_differences(differences: dict[str, dict[str, Any]], names: list[str]) -> list[Chart]:
    """Draw a forest plot for each figure: the models' differences to the baseline with their 95% intervals."""
    charts = []
    for name in names:
        rows: Rows = []
        for model, each in differences.items():
            if name in each:
                shown = {True: "better", False: "worse"}.get(each[name].get("better"), SHOWN[2])
                ends = {key: point_value(each[name], key) for key in ("mean", "low", "high")}
                rows.append({"model": model, "shown": shown, "p": point_value(each[name], "p_holm"), **ends})
        if not rows:
            continue
        colour = alt.Color("shown:N", scale=alt.Scale(domain=SHOWN, range=SHOWN_COLOURS), legend=None)
        y = alt.Y("model:N", title=None, sort=None, axis=alt.Axis(labelLimit=120))
        base = alt.Chart(alt.Data(values=rows)).encode(y=y, color=colour)
        bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=None), x2=alt.X2("high:Q"))
        dots = base.mark_point(filled=True, size=60, opacity=1).encode(
            x=alt.X("mean:Q"), tooltip=tooltips("model:N", "mean:Q", "low:Q", "high:Q", "p:Q", "shown:N")
        )
        spec = alt.layer(draw_zero(), bars, dots, width=240, height=alt.Step(24)).to_dict(validate=False)
        figure = figure_of(name)
        charts.append(Chart(figure.title, f"difference, {figure.unit}", spec))
    return charts


def draw_lines(title: str, unit: str, curves: Curves, x: alt.X, key: str = "mean") -> list[Chart]:
    """Draw a line with its 95% band per model, of points that have the field of ``x`` and a figure under ``key``."""
    field = str(x.shorthand).partition(":")[0]
    rows: Rows = []
    for model, points in curves.items():
        for point in points:
            figure = point if key == "mean" else mapping(point, key)
            ends = {end: point_value(figure, end) for end in ("mean", "low", "high")}
            place = point.get(field)
            rows.append({"model": model, field: place if isinstance(place, str) else short(number(place)), **ends})
    if not any(row["mean"] is not None for row in rows):
        return []
    colour = alt.Color("model:N", sort=None, legend=alt.Legend(columns=2) if len(curves) > 1 else None)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=colour)
    band = base.mark_area(style="band").encode(
        y=alt.Y("low:Q", title=None, scale=alt.Scale(zero=False)), y2=alt.Y2("high:Q")
    )
    line = base.mark_line(point=True).encode(
        y=alt.Y("mean:Q"), tooltip=tooltips("model:N", f"{field}:N", "mean:Q", "low:Q", "high:Q")
    )
    return [Chart(title, unit, alt.layer(band, line, **SIZE).to_dict(validate=False))]


def draw_perplexity(curves: Curves) -> list[Chart]:
    """Draw the perplexity of the demonstrations' tokens by their position."""
    named = {
        model: [point | {"position": span(point.get("from"), point.get("to"))} for point in points]
        for model, points in curves.items()
    }
    x = alt.X("position:O", title="token of the answer", sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True))
    return draw_lines("Perplexity by position", "of the demonstrations' tokens; lower is better", named, x)


def span(first: Any, last: Any) -> str:
    return f"{first}" if first == last else f"{first}–{'' if last is None else last}"


def draw_calibration(curves: Curves) -> list[Chart]:
    """Draw how often the implicit reward is right, by how sure it is."""
    x = alt.X("confidence:Q", title="confidence", scale=alt.Scale(domain=[0.5, 1.0]))
    return draw_lines("Calibration", "share of pairs that the implicit reward gets right", curves, x)


def draw_by_samples(curves: dict[str, dict[str, Any]], kind: str, title: str) -> list[Chart]:
    """Draw what more samples per prompt give, a chart per figure: ``pass`` or ``best_of`` of each model's curves."""
    x = alt.X("n:Q", title="samples", scale=alt.Scale(type="log", base=2, nice=False), axis=alt.Axis(format="d"))
    charts: list[Chart] = []
    for name in dict.fromkeys(name for each in curves.values() for name in each.get(kind, {})):
        points = {model: each[kind][name] for model, each in curves.items() if each.get(kind, {}).get(name)}
        if kind == "pass":
            charts += draw_lines(f"{figure_of(name).title}: {title}", figure_of(name).unit, points, x)
            continue
        keys = [key for key in next(iter(points.values()))[0] if key not in ("n", "kl_bound", "count")]
        for key in keys:
            label = f"{figure_of(key).title}: {title} {figure_of(name).title}"
            charts += draw_lines(label, figure_of(key).unit, points, x, key)
    return charts


def point_value(figure: dict[str, Any], key: str) -> float | None:
    return short(number(figure.get(key)))
