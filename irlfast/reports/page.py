"""The report of a run: one HTML page that opens offline, from the files of a finished or stopped run (DESIGN §5).

    python -m irlfast.report OUTPUT_DIR

Read the files, judge, draw (SVG), mark the answers, fill ``report.html.j2``, write. A file that is missing or broken
is named in the page; only a folder that is no run (no ``config.yaml``) is an error.
"""

import math
import re
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from irlfast import __version__
from irlfast.common.files import write_text
from irlfast.reports.files import (
    TIMES,
    note_unfinished,
    number,
    read_config,
    read_lines,
    read_metrics,
    read_object,
    read_phases,
    split_time,
)
from irlfast.reports.plots import METRICS, POINTS, draw_curves, draw_held_out

PROMPTS = 20  # held-out prompts shown, and
CHARACTERS = 1200  # of each text shown: 20 rows of 4 marked texts stay far under 2 MB
NLL_CHANGE = 0.02  # a smaller relative change of the demonstrations' nll is called no clear change


def write_report(output_dir: Path) -> Path:
    """Write ``output_dir/report.html`` from the files of the run and return its path.

    Raises:
        InputError: (a ValueError) where ``output_dir`` holds no ``config.yaml``.
    """
    output_dir = Path(output_dir)
    notes: list[str] = []  # what is missing or broken, in words
    config_text, config = read_config(output_dir, notes)
    metrics = read_metrics(output_dir, METRICS + TIMES, notes)
    evals = read_phases(output_dir, "eval.json", notes)
    pairs = read_phases(output_dir, "pairs.json", notes)
    data = read_object(output_dir, "data.json", notes)
    policy = read_object(output_dir, "final/policy.json", notes)
    note_unfinished(config, evals, pairs, notes)
    first, kept = first_and_kept(evals, policy, notes)
    changes = compare(evals[first], evals[kept]) if evals else []
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
        curves=draw_curves(metrics) if metrics else [],
        logged=sum(map(len, metrics.values())),
        points=POINTS,
        held_out=draw_held_out(evals, kept) if len(evals) > 1 else [],
        answers=compare_answers(output_dir, first, kept, notes) if evals else {"rows": []},
        data={name: counts for name, counts in data.items() if isinstance(counts, dict)},
        pairs=pairs,
        times=split_time(metrics, pairs, read_phases(output_dir, "round.json", notes)),
        config=config_text,
        version=__version__,
        show=show,
    )
    path = output_dir / "report.html"
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))  # a model may write half a surrogate pair
    return path


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


def compare_answers(output_dir: Path, first: str, kept: str, notes: list[str]) -> dict[str, Any]:
    """The first held-out prompts with three answers each, and over all prompts how many answers came and went."""
    before = list(read_lines(output_dir, f"{first}/answers.jsonl", notes))
    after = before if kept == first else list(read_lines(output_dir, f"{kept}/answers.jsonl", notes))
    rows: list[dict[str, Any]] = []
    counts = {"kept": 0, "gained": 0, "lost": 0, "never": 0}
    names: dict[tuple[bool | None, bool | None], str]
    names = {(True, True): "kept", (False, True): "gained", (True, False): "lost", (False, False): "never"}
    nothing: dict[str, Any] = {}
    for one, two in zip_longest(before, after, fillvalue=nothing):
        expert = str((one | two).get("expert", ""))
        right = [str(row["answer"]).strip() == expert.strip() if "answer" in row else None for row in (one, two)]
        if (name := names.get((right[0], right[1]))) is not None:
            counts[name] += 1
        if len(rows) < PROMPTS:
            texts = [mark(expert, str(row["answer"])) if "answer" in row else None for row in (one, two)]
            prompt = str((one | two).get("prompt", ""))
            rows.append({"prompt": clip(prompt), "expert": clip(expert), "texts": texts, "right": right})
    return {"rows": rows, "counts": counts, "total": max(len(before), len(after))}


def clip(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS:,} more characters)"


def mark(expert: str, answer: str) -> Markup:
    """The answer with the words that the expert does not have marked and, where close, the missing ones struck."""
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


def show(value: Any, form: str = ",.2f") -> str:
    """A number for a reader: a count in full, any other as ``form`` says, a dash where it is missing."""
    if not math.isfinite(number(value)):
        return "not finite" if math.isinf(number(value)) else "–"
    return f"{value:{',' if isinstance(value, int) and form.endswith('f') else form}}"
