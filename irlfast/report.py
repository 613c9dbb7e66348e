"""The report of a run: one HTML page that opens offline, from the files of a finished or stopped run (DESIGN §5).

    python -m irlfast.report OUTPUT_DIR

Read the files, judge, draw (SVG), mark the answers, fill ``report.html.j2``, write. A file that is missing or broken
is named in the page; only a folder that is no run (no ``config.yaml``) is an error.
"""

import io
import json
import math
import re
import sys
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import yaml
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from irlfast import __version__
from irlfast.files import InputError, write_text

PHASE = re.compile(r"initial|sft|stage-\d{1,6}")  # a closed set, because phase names become text of the plots
PROMPTS = 20  # held-out prompts shown, and
CHARACTERS = 1200  # of each text shown: 20 rows of 4 marked texts stay far under 2 MB
POINTS = 240  # of a curve, about one for each 1.5 pixels of its panel
NLL_CHANGE = 0.02  # a smaller relative change of the demonstrations' nll is called no clear change

# Colours that matplotlib writes and the page replaces by CSS variables: one SVG serves light, dark and print.
INK, LINE, EXPERT, SYNTHETIC = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "var(--muted)", LINE: "var(--line)", EXPERT: "var(--expert)", SYNTHETIC: "var(--synthetic)"}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "irlfast", "font.size": 8, "text.color": INK, "lines.linewidth": 1.4}

# Panels: title, unit, keys of metrics.jsonl or eval.json, a level to compare with.
CURVES: list[tuple[str, str, list[str], float | None]] = [
    ("Reward margin", "expert − synthetic, × β", ["rewards/margins"], 0.0),
    ("Reward accuracy", "share of pairs; line: chance", ["rewards/accuracies"], 0.5),
    ("Demonstration log-likelihood", "nats an answer", ["logps/chosen"], None),
    ("Loss", "", ["loss"], None),
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
METRICS = [key for _, _, keys, _ in CURVES for key in keys]


def write_report(output_dir: Path) -> Path:
    """Write ``output_dir/report.html`` from the files of the run and return its path.

    Raises:
        InputError: (a ValueError) where ``output_dir`` holds no ``config.yaml``.
    """
    output_dir = Path(output_dir)
    notes: list[str] = []  # what is missing or broken, in words
    config_text, config = read_config(output_dir, notes)
    metrics = read_metrics(output_dir, notes)
    evals = read_phases(output_dir, "eval.json", notes)
    pairs = read_phases(output_dir, "pairs.json", notes)
    data = read_object(output_dir, "data.json", notes)
    policy = read_object(output_dir, "final/policy.json", notes)
    note_unfinished(config, evals, pairs, notes)
    first, kept = first_and_kept(evals, policy, notes)
    changes = compare(evals[first], evals[kept]) if evals else []
    with mpl.rc_context(STYLE):
        curves = [(title, unit, len(keys), draw_curve(keys, level, metrics)) for title, unit, keys, level in CURVES]
        held_out = [(title, unit, 1, draw_held_out(key, level, evals, kept)) for title, unit, key, level in HELD_OUT]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=[str(config[key]) for key in ("method", "model_name_or_path", "dataset_name") if config.get(key)],
        headline=headline(changes, first, kept),
        changes=changes,
        warnings=warn(changes, metrics),
        why=policy.get("why"),
        notes=notes,
        first=first,
        kept=kept,
        evals=evals,
        curves=curves if metrics else [],
        logged=sum(map(len, metrics.values())),
        points=POINTS,
        held_out=held_out if len(evals) > 1 else [],
        answers=compare_answers(output_dir, first, kept, notes) if evals else {"rows": []},
        data={name: counts for name, counts in data.items() if isinstance(counts, dict)},
        pairs=pairs,
        config=config_text,
        version=__version__,
        show=show,
    )
    path = output_dir / "report.html"
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))  # a model may write half a surrogate pair
    return path


# --------------------------------------------------------------------------------------------------- files of the run


def read_config(output_dir: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    path = output_dir / "config.yaml"
    if not path.is_file():
        raise InputError(f"{output_dir}: no config.yaml in this folder; expected the output_dir of a run")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if isinstance(config, dict):
        return text, config
    notes.append("config.yaml cannot be read: expected keys and values.")
    return text, {}


def read_object(output_dir: Path, name: str, notes: list[str]) -> dict[str, Any]:
    """A JSON object; an empty one, and a note, where the file is missing or holds something else."""
    path = output_dir / name
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    notes.append(f"{name} {'cannot be read: expected a JSON object' if path.is_file() else 'is missing'}.")
    return {}


def read_lines(output_dir: Path, name: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file. A run that was killed may leave half a line, which is left out and noted."""
    if not (output_dir / name).is_file():
        notes.append(f"{name} is missing.")
        return
    broken = 0
    with (output_dir / name).open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                broken += 1
    if broken:
        notes.append(f"{name}: {broken:,} unreadable line{'s' if broken > 1 else ''} left out.")


def phase_order(phase: str) -> int:
    return {"initial": -2, "sft": -1}.get(phase) or int(phase.removeprefix("stage-"))


def read_phases(output_dir: Path, name: str, notes: list[str]) -> dict[str, dict[str, Any]]:
    """The file ``name`` of every phase that has one, in the order of the run."""
    phases = [path.parent.name for path in output_dir.glob(f"*/{name}") if PHASE.fullmatch(path.parent.name)]
    read = {phase: read_object(output_dir, f"{phase}/{name}", notes) for phase in sorted(phases, key=phase_order)}
    return {phase: value for phase, value in read.items() if value}


def read_metrics(output_dir: Path, notes: list[str]) -> dict[str, np.ndarray]:
    """Phase -> [steps, 1 + METRICS]: the step, then its metrics. A step logged twice (a resumed run) counts once."""
    phases: dict[str, dict[float, list[float]]] = {}
    for row in read_lines(output_dir, "metrics.jsonl", notes):
        phase, step = str(row.get("phase")), number(row.get("step"))
        if PHASE.fullmatch(phase) and math.isfinite(step):
            phases.setdefault(phase, {})[step] = [step, *(number(row.get(key)) for key in METRICS)]
    ordered = sorted(phases, key=phase_order)
    return {phase: np.array([row for _, row in sorted(phases[phase].items())]) for phase in ordered}


def note_unfinished(config: dict, evals: dict, pairs: dict, notes: list[str]) -> None:
    stages = {phase for phase in [*evals, *pairs] if phase.startswith("stage-")}
    for name, found in (("eval.json", evals), ("pairs.json", pairs)):
        notes.extend(f"{phase}/{name} is missing." for phase in sorted(stages.difference(found)))
    done, planned = len(stages.intersection(evals)), config.get("stages")
    if isinstance(planned, int) and config.get("method") != "sft" and done < planned:
        notes.append(f"{done} of {planned} stages have been evaluated.")
    if not evals:
        notes.append("No phase has an eval.json: no policy of this run has been evaluated.")


def number(value: Any) -> float:
    """A value as a float: NaN where it is missing, infinity where it is there but not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < 1e30 else math.inf  # a NaN compares false too


def show(value: Any, form: str = ",.2f") -> str:
    """A number for a reader: a count in full, any other as ``form`` says, a dash where it is missing."""
    if not math.isfinite(number(value)):
        return "not finite" if math.isinf(number(value)) else "–"
    return f"{value:{',' if isinstance(value, int) and form.endswith('f') else form}}"


# -------------------------------------------------------------------------------------------------------- the verdict


def first_and_kept(evals: dict, policy: dict, notes: list[str]) -> tuple[str, str]:
    """The policy that self-play started from, and the one the run ends with (the last evaluated, if none is named)."""
    if not evals:
        return "", ""
    first = "sft" if "sft" in evals and any(phase.startswith("stage-") for phase in evals) else next(iter(evals))
    last = list(evals)[-1]
    kept = str(policy.get("kept", last))
    if kept not in evals:
        notes.append(f"The kept policy ({kept}) has no eval.json; the last one evaluated ({last}) stands in for it.")
    return first, kept if kept in evals else last


def compare(first: dict, kept: dict) -> list[dict[str, Any]]:
    """First policy -> kept policy. ``sign``: 1 better, -1 worse, 0 no clear change, None not measured."""
    rows = number(kept.get("count"))
    chance = 0.5  # the first policy is its own reference: its rewards are all 0, its accuracy a coin's
    before = first.get("reward_accuracy")
    return [
        compare_shares("exact match", first.get("exact_match"), kept.get("exact_match"), rows),
        compare_nll(first.get("nll"), kept.get("nll")),
        compare_shares("reward accuracy", chance if before is None else before, kept.get("reward_accuracy"), rows),
    ]


def compare_shares(name: str, before: Any, after: Any, rows: float) -> dict[str, Any]:
    """Two shares of ``rows`` rows; within two standard errors they do not clearly differ."""
    p, q = number(before), number(after)
    tile: dict[str, Any] = {"name": name, "before": show(before, ".1%"), "after": show(after, ".1%"), "sign": None}
    if not math.isfinite(p + q):
        return tile | {"words": "not measured"}
    noise = 2 * math.sqrt(max(p * (1 - p) + q * (1 - q), 0) / rows) if rows > 0 else 0.0
    sign = int(np.sign(q - p)) if abs(q - p) > noise else 0
    words = f"{100 * (q - p):+.1f} points on {show(rows, ',.0f')} held-out prompts"
    return tile | {"sign": sign, "words": words if sign or p == q else words + ", within the noise"}


def compare_nll(before: Any, after: Any) -> dict[str, Any]:
    p, q = number(before), number(after)
    tile: dict[str, Any] = {"name": "demonstration likelihood", "before": show(before), "after": show(after)}
    if math.isfinite(p) and math.isinf(q):
        return tile | {"sign": -1, "words": "nll is no longer a finite number"}
    if not math.isfinite(p + q) or p <= 0:
        return tile | {"sign": None, "words": "not measured"}
    change = q / p - 1
    sign = -int(np.sign(change)) if abs(change) > NLL_CHANGE else 0
    words = {1: "more likely", 0: "about as likely", -1: "less likely"}[sign]
    return tile | {"sign": sign, "words": f"nll in nats an answer, {change:+.1%}: {words}"}


def headline(changes: list[dict[str, Any]], first: str, kept: str) -> tuple[str, str]:
    """A word or two, and the sentence that says why."""
    if not changes:
        return "Not known yet", "No policy of this run has been evaluated."
    if first == kept:
        return "No change", f"The final policy is the first one ({first}): no later one was evaluated and kept."
    by = {sign: " and ".join(c["name"] for c in changes if c["sign"] == sign) for sign in (1, -1, 0, None)}
    word = "Mixed" if by[1] and by[-1] else "Improved" if by[1] else "Worse" if by[-1] else "No clear change"
    phrases = {1: "better on", -1: "worse on", 0: "not clearly different on", None: "not measured on"}
    parts = "; ".join(f"{phrase} {by[sign]}" for sign, phrase in phrases.items() if by[sign])
    return word, f"Against the first policy ({first}), the final one ({kept}) is {parts}."


def warn(changes: list[dict[str, Any]], metrics: dict[str, np.ndarray]) -> list[str]:
    found = [
        f"The log-likelihood of the demonstrations fell: nll {change['before']} → {change['after']}. "
        "The policy has moved away from the answers it was given to learn."
        for change in changes
        if change["name"] == "demonstration likelihood" and change["sign"] == -1
    ]
    for column, key in enumerate(METRICS, 1):
        count = sum(int(np.isinf(rows[:, column]).sum()) for rows in metrics.values())
        if count:
            found.append(f"{key}: {count:,} logged value{'s are' if count > 1 else ' is'} not finite.")
    return found


# ---------------------------------------------------------------------------------------------------------- the plots


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


def draw_held_out(key: str, level: float | None, evals: dict[str, dict], kept: str) -> Markup | None:
    """A panel over the phases, the kept policy a full dot."""
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


# -------------------------------------------------------------------------------------------------------- the answers


def compare_answers(output_dir: Path, first: str, kept: str, notes: list[str]) -> dict[str, Any]:
    """The first held-out prompts with three answers each, and over all prompts how many answers came and went."""
    before = list(read_lines(output_dir, f"{first}/answers.jsonl", notes))
    after = before if kept == first else list(read_lines(output_dir, f"{kept}/answers.jsonl", notes))
    rows, counts = [], {"kept": 0, "gained": 0, "lost": 0, "never": 0}
    for one, two in zip_longest(before, after, fillvalue={}):
        expert = str((one | two).get("expert", ""))
        right = [str(row["answer"]).strip() == expert.strip() if "answer" in row else None for row in (one, two)]
        if None not in right:
            name = {(True, True): "kept", (False, True): "gained", (True, False): "lost"}.get((right[0], right[1]))
            counts[name or "never"] += 1
        if len(rows) < PROMPTS:
            texts = [mark(expert, str(row["answer"])) if "answer" in row else None for row in (one, two)]
            prompt = str((one | two).get("prompt", ""))
            rows.append({"prompt": clip(prompt), "expert": clip(expert), "texts": texts, "right": right})
    return {"rows": rows, "counts": counts, "total": max(len(before), len(after))}


def clip(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS:,} more characters)"


def mark(expert: str, answer: str) -> Markup:
    """The answer, with the words that the expert does not have marked and, where it is close, the missing ones struck."""
    theirs, ours = (re.findall(r"\s+|\w+|[^\w\s]", clip(text)) for text in (expert, answer))
    matcher = SequenceMatcher(None, theirs, ours)
    close = matcher.ratio() > 0.5  # else the struck words would drown the answer
    parts = []
    for kind, i, j, k, m in matcher.get_opcodes():
        missing, words = "".join(theirs[i:j]), "".join(ours[k:m])
        if missing and kind != "equal" and close:
            parts.append(Markup("<del>{}</del>").format(missing))
        if words:
            parts.append(escape(words) if kind == "equal" else Markup("<mark>{}</mark>").format(words))
    return Markup("").join(parts)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m irlfast.report OUTPUT_DIR")
    try:
        print(write_report(Path(sys.argv[1])))
    except InputError as error:
        sys.exit(f"irlfast.report: {error}")
