"""The report of a finished or stopped run: one HTML page that opens offline (docs/design.md, section 5).

    python -m irlfast.report OUTPUT_DIR

``metrics.py`` lists the metrics that the page shows. The page names a file that is missing or broken. Only a folder
without a ``config.yaml`` is an error, because it is no run.
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
from irlfast.reports.metrics import HELD_OUT, TRAINING_KEYS
from irlfast.reports.plots import POINTS, draw_curves, draw_held_out

PROMPTS = 20  # held-out prompts on the page
CHARACTERS = 1200  # characters of each text on the page: 20 rows of 4 marked texts stay far under 2 MB
NLL_CHANGE = 0.02  # a smaller relative change of the demonstrations' nll counts as no clear change


def write_report(output_dir: Path) -> Path:
    """Write ``output_dir/report.html`` from the files of the run and return its path.

    Raises:
        InputError: (a ValueError) ``output_dir`` holds no ``config.yaml``.
    """
    output_dir = Path(output_dir)
    notes: list[str] = []  # sentences about missing or broken files
    config_text, config = read_config(output_dir, notes)
    metrics = read_metrics(output_dir, TRAINING_KEYS + TIMES, notes)
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
        warnings=list_warnings(changes, metrics),
        why=policy.get("why"),
        notes=notes,
        first=first,
        kept=kept,
        evals=evals,
        held_out_metrics=HELD_OUT,
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
    """Return the policy that self-play started from, and the policy that the run keeps.

    If no policy is named as kept, the last evaluated one stands in for it.
    """
    if not evals:
        return "", ""
    first = "sft" if "sft" in evals and any(phase.startswith("stage-") for phase in evals) else next(iter(evals))
    last = list(evals)[-1]
    kept = str(policy.get("kept", last))
    if kept not in evals:
        notes.append(f"The kept policy ({kept}) has no eval.json; the last one evaluated ({last}) stands in for it.")
    return first, kept if kept in evals else last


def compare(first: dict, kept: dict) -> list[dict[str, Any]]:
    """Judge the change from the first policy to the kept policy.

    ``sign`` is 1 for better, -1 for worse, 0 for no clear change, None for not measured.
    """
    rows = number(kept.get("count"))
    chance = 0.5  # the first policy is its own reference: all its rewards are 0, and its accuracy is a coin's
    before = first.get("reward_accuracy")
    return [
        compare_shares("exact match", first.get("exact_match"), kept.get("exact_match"), rows),
        compare_nll(first.get("nll"), kept.get("nll")),
        compare_shares("reward accuracy", chance if before is None else before, kept.get("reward_accuracy"), rows),
    ]


def compare_shares(name: str, before: Any, after: Any, rows: float) -> dict[str, Any]:
    """Compare two shares of ``rows`` rows. Within two standard errors there is no clear change."""
    p, q = number(before), number(after)
    tile: dict[str, Any] = {"name": name, "before": show(before, ".1%"), "after": show(after, ".1%"), "sign": None}
    if not math.isfinite(p + q):
        return tile | {"words": "not measured"}
    noise = 2 * math.sqrt(max(p * (1 - p) + q * (1 - q), 0) / rows) if rows > 0 else 0.0
    sign = int(np.sign(q - p)) if abs(q - p) > noise else 0
    words = f"{100 * (q - p):+.1f} points on {show(rows, ',.0f')} held-out prompts"
    return tile | {"sign": sign, "words": words if sign or p == q else words + ", within the noise"}


def compare_nll(before: Any, after: Any) -> dict[str, Any]:
    """Compare two negative log-likelihoods of the demonstrations. A change below ``NLL_CHANGE`` is no clear change."""
    p, q = number(before), number(after)
    tile: dict[str, Any] = {"name": "demonstration likelihood", "before": show(before), "after": show(after)}
    if math.isfinite(p) and math.isinf(q):
        return tile | {"sign": -1, "words": "nll is no longer a finite number"}
    if not math.isfinite(p + q) or p <= 0:
        return tile | {"sign": None, "words": "not measured"}
    change = q / p - 1
    sign = -int(np.sign(change)) if abs(change) > NLL_CHANGE else 0
    words = {1: "more likely", 0: "about as likely", -1: "less likely"}[sign]
    return tile | {"sign": sign, "words": f"nll in nats per answer, {change:+.1%}: {words}"}


def headline(changes: list[dict[str, Any]], first: str, kept: str) -> tuple[str, str]:
    """Return a verdict in one to three words, and a sentence that gives its reason."""
    if not changes:
        return "Not known yet", "No policy of this run has been evaluated."
    if first == kept:
        return "No change", f"The final policy is the first one ({first}): no later one was evaluated and kept."
    names = {sign: " and ".join(c["name"] for c in changes if c["sign"] == sign) for sign in (1, -1, 0, None)}
    verdict = "No clear change"
    if names[1] or names[-1]:
        verdict = "Worse" if not names[1] else "Mixed" if names[-1] else "Improved"
    phrases = {1: "better on", -1: "worse on", 0: "not clearly different on", None: "not measured on"}
    parts = "; ".join(f"{phrase} {names[sign]}" for sign, phrase in phrases.items() if names[sign])
    return verdict, f"Against the first policy ({first}), the final one ({kept}) is {parts}."


def list_warnings(changes: list[dict[str, Any]], metrics: dict[str, np.ndarray]) -> list[str]:
    """Warn of demonstrations that became less likely, and of logged values that are not finite."""
    warnings = [
        f"The log-likelihood of the demonstrations fell: nll {change['before']} → {change['after']}. "
        "The policy has moved away from the answers it was given to learn."
        for change in changes
        if change["name"] == "demonstration likelihood" and change["sign"] == -1
    ]
    for column, key in enumerate(TRAINING_KEYS, 1):
        count = sum(int(np.isinf(rows[:, column]).sum()) for rows in metrics.values())
        if count:
            warnings.append(f"{key}: {count:,} logged value{'s are' if count > 1 else ' is'} not finite.")
    return warnings


def compare_answers(output_dir: Path, first: str, kept: str, notes: list[str]) -> dict[str, Any]:
    """Return the first held-out prompts with three answers each, and the counts of answers gained and lost over all."""
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
        name = names.get((right[0], right[1]))
        if name is not None:
            counts[name] += 1
        if len(rows) < PROMPTS:
            texts = [mark(expert, str(row["answer"])) if "answer" in row else None for row in (one, two)]
            prompt = str((one | two).get("prompt", ""))
            rows.append({"prompt": clip(prompt), "expert": clip(expert), "texts": texts, "right": right})
    return {"rows": rows, "counts": counts, "total": max(len(before), len(after))}


def clip(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS:,} more characters)"


def mark(expert: str, answer: str) -> Markup:
    """Mark the answer's words that the expert's answer lacks; if both are close, add the missing words, struck."""
    theirs, ours = (re.findall(r"\s+|\w+|[^\w\s]", clip(text)) for text in (expert, answer))
    matcher = SequenceMatcher(None, theirs, ours)
    close = matcher.ratio() > 0.5  # otherwise the struck words would drown the answer
    parts = []
    for kind, i, j, k, m in matcher.get_opcodes():
        missing, words = "".join(theirs[i:j]), "".join(ours[k:m])
        if missing and kind != "equal" and close:
            parts.append(Markup("<del>{}</del>").format(missing))
        if words:
            parts.append(escape(words) if kind == "equal" else Markup("<mark>{}</mark>").format(words))
    return Markup("").join(parts)


def show(value: Any, form: str = ",.2f") -> str:
    """Write a number for a reader: a count in full, any other number as ``form`` says, a dash for a missing one."""
    if not math.isfinite(number(value)):
        return "not finite" if math.isinf(number(value)) else "–"
    return f"{value:{',' if isinstance(value, int) and form.endswith('f') else form}}"
