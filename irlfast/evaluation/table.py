"""Make ``figures.json`` of an evaluation from the models' rows: means with intervals, and differences with tests.

The rows are read one at a time, and only their numbers stay in memory.
"""

from array import array
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from irlfast.common.files import InputError, read_jsonl, write_json
from irlfast.evaluation.curves import (
    POSITIONS,
    best_of_curves,
    by_position,
    calibration,
    calibration_error,
    pass_curves,
    perplexity_by_position,
)
from irlfast.evaluation.figures import RATIO, SAMPLED, figure_of, is_share
from irlfast.evaluation.statistics import (
    LEVEL,
    holm,
    mcnemar_p,
    mean_interval,
    permutation_p,
    pooled,
    prompts_needed,
    share_difference_interval,
    share_interval,
    with_two_more,
)

SAME = "no difference shown"


class Numbers(NamedTuple):
    """All numbers of a model's rows; NaN where a prompt or a sample has no such number."""

    figures: dict[str, np.ndarray]  # [P]; those of samples are means, under the name sampled_FIGURE
    samples: dict[str, np.ndarray]  # [P, n]
    tokens: np.ndarray  # [P] of the expert's answer
    positions: np.ndarray  # [P, 2, POSITIONS]: by position, the sum of its tokens' log-probabilities, and their number


def write_figures(folder: Path) -> dict[str, Any]:
    """Write ``folder/figures.json`` from ``folder/models`` and ``folder/judge`` alone, and return it.

    docs/evaluation.md lists its keys.

    Raises:
        InputError: two models have rows for other numbers of prompts, or a row has another number of samples.
    """
    settings = yaml.safe_load((folder / "evaluation.yaml").read_text(encoding="utf-8"))
    models = {name: read_numbers(folder / "models" / name) for name in settings["models"]}
    for name, numbers in models.items():
        numbers.figures.update(read_outcomes(folder / "judge" / name / "outcomes.jsonl"))
    baseline = next(iter(models))
    for name, numbers in models.items():
        if len(numbers.tokens) != len(models[baseline].tokens):
            raise InputError(
                f"{folder}/models/{name}: found rows of {len(numbers.tokens):,} prompts, expected those of "
                f"{len(models[baseline].tokens):,}, as {baseline} has"
            )
    beta = np.atleast_1d(settings["beta"])[0]  # of the first stage
    shares = shares_among([*models.values()])
    result: dict[str, Any] = {
        "models": {name: means(numbers, shares) for name, numbers in models.items()},
        "baseline": baseline,
        "differences": {
            name: compare(numbers, with_losses(models[baseline], numbers), shares)
            for name, numbers in models.items()
            if name != baseline
        },
    }
    result["seeds"] = {
        label: {"models": names, "differences": pool([models[name] for name in names], [models[name] for name in base])}
        for label, (names, base) in seeds_of(settings, baseline).items()
    }
    result["curves"] = {
        name: {
            "perplexity": perplexity_by_position(numbers.positions),
            "pass": pass_curves(numbers.samples, shares),
            "best_of": best_of_curves(numbers.samples),
            "calibration": calibration(numbers.figures.get("preference_margin", np.array([])), beta),
        }
        for name, numbers in models.items()
    }
    for curves in result["curves"].values():
        curves["calibration_error"] = calibration_error(curves["calibration"])
    write_json(folder / "figures.json", result)
    return result


# ---------------------------------------------------------------- reading


def read_numbers(folder: Path, files: str = "part-*.jsonl") -> Numbers:
    """Read the numbers of a model's rows, file by file.

    Raises:
        InputError: there are no rows, or a row has no figures, or another number of samples than those before it.
    """
    rows = 0
    figures: dict[str, array] = {}
    samples: dict[str, array] = {}
    counts: dict[str, int] = {}
    positions = array("d")
    for path in sorted(folder.glob(files)):
        for line, row in read_jsonl(path):
            if not isinstance(row.get("figures"), dict):
                raise InputError(f"{path}, line {line}: found no figures, expected an object with a number for each")
            for name, value in row["figures"].items():
                figures.setdefault(name, absent(rows)).append(value)
            for name, values in row.get("sample_figures", {}).items():
                count = counts.setdefault(name, len(values))
                if len(values) != count:
                    raise InputError(f"{path}, line {line}: found {len(values)} values of {name}, expected {count}")
                drawn = samples.setdefault(name, absent(count * rows))
                drawn.extend(np.nan if value is None else value for value in values)
            positions.extend(by_position([logp for _, logp in row.get("expert_tokens", [])]))
            rows += 1
            for each in figures.values():
                each.extend(absent(rows - len(each)))
            for name, each in samples.items():
                each.extend(absent(counts[name] * rows - len(each)))
    if not rows:
        raise InputError(f"{folder}: found no rows, expected {files}")
    sampled = {name: np.asarray(values).reshape(rows, counts[name]) for name, values in samples.items()}
    every = {name: np.asarray(values) for name, values in figures.items()}
    every |= {SAMPLED + name: mean_of_samples(values) for name, values in sampled.items()}
    by_bucket = np.asarray(positions).reshape(rows, 2, POSITIONS)
    return Numbers(every, sampled, by_bucket[:, 1].sum(1), by_bucket)


def read_outcomes(path: Path) -> dict[str, np.ndarray]:
    """Return a model's win rate by the judge, ``[P]``, if there is one; NaN where the judge gave no two verdicts."""
    if not path.exists():
        return {}
    outcomes = [row["outcome"] for _, row in read_jsonl(path)]
    return {"win_rate": np.array([np.nan if each is None else each for each in outcomes])}


def with_losses(baseline: Numbers, numbers: Numbers) -> Numbers:
    """Return the baseline's numbers with its own win rate against the model of ``numbers``."""
    losses = {name: 1 - values for name, values in numbers.figures.items() if name == "win_rate"}
    return baseline._replace(figures=baseline.figures | losses)


def absent(count: int) -> array:
    return array("d", [np.nan]) * count


def mean_of_samples(values: np.ndarray) -> np.ndarray:
    """Return the mean of each prompt's samples that have a value, from ``[P, n]``; NaN where none has."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(1) / known.sum(1)


def shares_among(models: Sequence[Numbers]) -> set[str]:
    """Return the names of the figures that are shares of yes-or-no answers in all models."""
    each: dict[str, list[np.ndarray]] = defaultdict(list)
    for numbers in models:
        for name, values in numbers.figures.items():
            each[name].append(numbers.samples.get(name.removeprefix(SAMPLED), values))
    return {name for name, arrays in each.items() if all(is_share(name, values) for values in arrays)}


# ---------------------------------------------------------------- one model


def means(numbers: Numbers, shares: set[str]) -> dict[str, Any]:
    """Return the mean, the interval and the count of every figure."""
    return {
        name: interval_of(name, values, numbers.tokens, name in shares)
        for name, values in numbers.figures.items()
        if not np.isnan(values).all()
    }


def interval_of(name: str, values: np.ndarray, tokens: np.ndarray, share: bool) -> dict[str, Any]:
    """Return the mean of a figure's values ``[P]`` with its interval; NaN is no value.

    ``tokens [P]`` counts those of the demonstrations, which weight the prompts of a figure per token.
    """
    known = ~np.isnan(values)
    if share:
        interval = share_interval(values[known])
    else:
        interval = mean_interval(values[known], tokens[known] if figure_of(name).per_token else None)
    return {**interval._asdict(), "count": int(known.sum())}


# ---------------------------------------------------------------- two models


def compare(numbers: Numbers, baseline: Numbers, shares: set[str]) -> dict[str, Any]:
    """Return the paired difference of every figure that both models have, with its test and its verdict.

    Figures per token are compared where both models read the demonstrations as the same numbers of tokens. Holm's
    correction is over all figures of the comparison.
    """
    result: dict[str, Any] = {}
    permuted: dict[bytes, dict[str, np.ndarray]] = defaultdict(dict)  # prompts -> figure -> differences
    for name in numbers.figures:
        if name not in baseline.figures:
            continue
        own, base = numbers.figures[name], baseline.figures[name]
        known = ~np.isnan(own - base)
        per_token = figure_of(name).per_token
        if not known.any() or (per_token and (numbers.tokens != baseline.tokens).any()):
            continue
        own, base, weights = own[known], base[known], numbers.tokens[known] if per_token else None
        result[name] = difference_of(name, own, base, weights, name in shares)
        # A tie of a judge is a win for neither model, so that McNemar's test compares wins with losses.
        if name == "win_rate" or (name in shares and np.isin([own, base], (0.0, 1.0)).all()):
            result[name] |= {"p": mcnemar_p(own, base), "test": "McNemar's, exact"}
        else:
            permuted[known.tobytes()][name] = (own - base) * (1.0 if weights is None else weights)
    for group in permuted.values():
        for name, p in zip(group, permutation_p(np.stack([*group.values()])), strict=True):
            result[name] |= {"p": float(p), "test": "permutation"}
    return judge_all(result)


def difference_of(
    name: str, own: np.ndarray, base: np.ndarray, weights: np.ndarray | None, share: bool
) -> dict[str, Any]:
    """Return the mean difference with its interval, and the prompts that would show a difference of one point."""
    differences = own - base
    interval = share_difference_interval(differences) if share else mean_interval(differences, weights)
    relative = 1.0 if weights is None else weights / weights.mean()
    spread = with_two_more(differences) if share else differences * relative
    point, text = point_of(name, base, share)
    needed = prompts_needed(float(spread.std()), point) if point else None
    return {**interval._asdict(), "count": len(differences), "needed": needed, "point": text}


def point_of(name: str, base: np.ndarray, share: bool) -> tuple[float, str]:
    """Return the difference of a figure that matters, as a number and in words."""
    figure = figure_of(name)
    if share or figure.unit == RATIO:
        return 0.01, "1 point"
    if figure.point is None:
        return float(base.std()) / 10, "a tenth of the baseline's standard deviation"
    return figure.point, f"{figure.point:g} {figure.unit}"


def judge_all(result: dict[str, Any]) -> dict[str, Any]:
    """Add Holm's correction over all figures of a comparison, and the verdict on each."""
    for (name, each), p in zip(result.items(), holm([each["p"] for each in result.values()]), strict=True):
        each["p_holm"] = p
        each["better"] = is_better(name, each)
        each["verdict"] = verdict(each)
    return result


def is_better(name: str, difference: dict[str, Any]) -> bool | None:
    """Return whether a difference is shown to be for the better; None if none is shown, or neither is better."""
    direction = figure_of(name).better
    if difference["p_holm"] >= 1 - LEVEL or not direction:
        return None
    return (difference["mean"] > 0) == (direction == "higher")


def verdict(difference: dict[str, Any]) -> str:
    """Return what the statistics support, in words: better, worse, higher, lower, or that no difference is shown."""
    if difference["p_holm"] >= 1 - LEVEL:
        needed = difference["needed"]
        return SAME + (f"; {needed:,} prompts would show {difference['point']}" if needed else "")
    if difference["better"] is None:
        return "higher" if difference["mean"] > 0 else "lower"
    return "better" if difference["better"] else "worse"


def is_shown(difference: dict[str, Any]) -> bool:
    """Return whether the verdict on a difference in ``figures.json`` is that there is one."""
    return not str(difference.get("verdict", SAME)).startswith(SAME)


# ---------------------------------------------------------------- several seeds


def seeds_of(settings: dict[str, Any], baseline: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return, for each group of models that differ in their seed alone, the models and the baseline of each.

    The baseline of a group is the first model; or the first group, seed by seed, if it has that model and as many
    seeds. ``settings["seeds"]`` has the groups: the names of their models, in the order of the seeds.
    """
    groups: dict[str, list[str]] = settings.get("seeds", {})
    first = next((names for names in groups.values() if baseline in names), [])
    return {
        label: (names, first if len(first) == len(names) else [baseline] * len(names))
        for label, names in groups.items()
        if baseline not in names
    }


def pool(models: Sequence[Numbers], baselines: Sequence[Numbers]) -> dict[str, Any]:
    """Return the mean difference of every figure over seeds and prompts, for new seeds as well as for new prompts.

    Prompts count where every model has the figure. A figure per token is one value per prompt here.
    """
    result: dict[str, Any] = {}
    for name in models[0].figures:
        if not all(name in numbers.figures for numbers in [*models, *baselines]):
            continue
        differences = np.stack(
            [own.figures[name] - base.figures[name] for own, base in zip(models, baselines, strict=True)]
        )
        known = ~np.isnan(differences).any(0)
        if known.sum() > 1:
            each = pooled(differences[:, known])
            facts = {
                "count": int(known.sum()),
                "seeds": len(models),
                "needed": None,
                "test": "mixed, over seeds and prompts",
            }
            result[name] = each._asdict() | facts
    return judge_all(result)
