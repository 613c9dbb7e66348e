"""The model card of ``final/``: how the model was made, what was measured, and what was not."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import irlfast
from irlfast.common.files import find_path, is_local
from irlfast.common.secrets import redacted
from irlfast.config import Config
from irlfast.config.checks import is_set
from irlfast.config.types import listed
from irlfast.evaluation.statistics import share_interval
from irlfast.reports.metrics import HELD_OUT, HeldOutMetric
from irlfast.runs.output import MAY_CHANGE

COLUMNS = [metric for metric in HELD_OUT if metric.card]


def policy_card(
    config: Config,
    data: Mapping[str, Any],
    kept: str,
    why: str,
    metrics: Sequence[Mapping[str, Any]],
    deleted: Sequence[str] = (),
) -> str:
    """Return the card of a policy, as Markdown behind a head of YAML.

    Args:
        data: the content of ``data.json``.
        kept: the phase whose policy this is, and ``why``.
        metrics: the content of each phase's ``eval.json``, in order.
        deleted: the phases whose policies ``save_total_limit`` has deleted.
    """
    rows = [f"| {row['phase']} | {' | '.join(cell(metric, row) for metric in COLUMNS)} |" for row in metrics]
    own = next(row for row in metrics if row["phase"] == kept)
    measured = {metric.key: own.get(metric.key) for metric in COLUMNS}
    head = card_head(config, "text-generation", config.method, measured, own.get("intervals", {}))
    gone = f" `save_total_limit` has deleted the policies of {', '.join(deleted)}." if deleted else ""
    more = [
        "No judge and no person compared answers (`irlfast evaluate --judge`), and no public benchmark was run "
        "(`irlfast evaluate --leaderboard`)."
    ]
    if config.keep == "best":
        more.append("The policy was chosen by these held-out figures, so they are too good.")
    return f"""{head}
# A policy trained from demonstrations with irlfast {irlfast.__version__}

Method `{config.method}`, on {names_of(config.dataset_name)}. This is the policy of `{kept}` ({why}).{gone}

{recipe_and_data(config, data)}
## Held-out figures

| after | {" | ".join(metric.card for metric in COLUMNS)} |
| --- | {" | ".join("---" for _ in COLUMNS)} |
{chr(10).join(rows)}

In brackets: 95% intervals over the held-out prompts. Reward accuracy: the share of (demonstration, sample of the first
policy) pairs whose implicit reward log π(y|x) − log π_first(y|x) is higher for the demonstration.

{not_tested(config, data, more)}"""


def reward_card(config: Config, data: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return the card of a reward model; ``metrics`` is the content of its ``eval.json``."""
    figures = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "seconds"}
    intervals = {}
    for name, pairs in figures.items():
        accuracy = name.replace("_pairs", "_accuracy")
        if name.endswith("_pairs"):
            measured = share_interval(np.arange(pairs) < round(figures[accuracy] * pairs))
            intervals[accuracy] = [measured.low, measured.high]
    rows = [f"| {name.replace('_', ' ')} | {figure(value, intervals.get(name))} |" for name, value in figures.items()]
    accuracies = {name: value for name, value in figures.items() if name.endswith("_accuracy")}
    best_of = "What a policy gains that learns from this reward, or whose best of n answers it chooses, is not in here."
    loss = f"Loss `{config.reward_loss}`, per {config.reward_level}, on pairs `{config.reward_data}`"
    return f"""{card_head(config, "text-classification", "reward-model", accuracies, intervals)}
# A reward model learned from demonstrations with irlfast {irlfast.__version__}

{loss} of {names_of(config.dataset_name)}.

It reads prompt and answer, end token included, in the policy's template. Several labels are the heads of an ensemble.

{recipe_and_data(config, data)}
## Held-out figures

| held-out | |
| --- | --- |
{chr(10).join(rows)}

In brackets: 95% intervals over the held-out pairs.

{not_tested(config, data, [best_of])}"""


# ---------------------------------------------------------------- sections


def recipe_and_data(config: Config, data: Mapping[str, Any]) -> str:
    recipe = fenced(yaml.safe_dump(changed_keys(config), sort_keys=False, allow_unicode=True))
    names = {"train": "training", "eval": "held out"}
    columns = ("rows", "kept", "prompt_tokens", "answer_tokens")
    rows = [
        f"| {names[part]} | {' | '.join(f'{data[part].get(column, 0):,}' for column in columns)} |"
        for part in names
        if data.get(part)
    ]
    fingerprint = data.get("fingerprint")
    return f"""## Recipe

Save these keys as `recipe.yaml`, and `irlfast train recipe.yaml` trains the model again. All others have the defaults
of irlfast {irlfast.__version__}. Absolute paths are shortened to their last part.

{recipe}

## Data

| set | rows | kept | prompt tokens | answer tokens |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{f"The fingerprint of their token ids is `{fingerprint}`." if fingerprint else ""}
"""


def not_tested(config: Config, data: Mapping[str, Any], more: Sequence[str]) -> str:
    """Return the section on what the figures do not show."""
    held_out = data.get("eval") or {}
    where = "from the training data's own source"
    if config.eval_dataset_name:
        where = f"from {names_of(config.eval_dataset_name)}"
    elif config.dataset_test_split:
        where = "from a split of the same dataset"
    lines = [
        f"Other prompts: the {held_out.get('kept', 0):,} held-out rows are {where}.",
        f"Other seeds: this is one run, of seed {config.seed}. The intervals do not hold the differences between runs.",
        "Nothing was measured of safety, bias or truth.",
        *more,
    ]
    if shared := held_out.get("prompts_also_in_train"):
        lines.append(f"{shared:,} held-out prompts are training prompts, too.")
    return "## What was not tested\n\n" + "".join(f"- {line}\n" for line in lines)


def changed_keys(config: Config) -> dict[str, Any]:
    """Return the keys that decide what was trained and have another value than the schema's default."""
    return {
        name: shortened(value)
        for name, value in dataclasses.asdict(config).items()
        if name == "method" or (name not in MAY_CHANGE and is_set(config, name))
    }


def shortened(value: Any) -> Any:
    """Return a value in which absolute paths, which say more about a machine than about a model, are last names.

    Secrets are redacted.
    """
    if isinstance(value, Mapping):
        return {name: shortened(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(each) for each in value]
    return redacted(Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value)


# ---------------------------------------------------------------- figures


def cell(metric: HeldOutMetric, row: Mapping[str, Any]) -> str:
    """Return a phase's value of a metric as the closing table and the card show it, with its interval."""
    value, interval = row.get(metric.key), row.get("intervals", {}).get(metric.key)
    if value is None:
        return "–"
    return figure(value, interval, metric.card_form, metric.card_sign)


def figure(value: float, interval: Sequence[float | None] | None, form: str = ",.3f", sign: int = 1) -> str:
    """Write a figure with the limits of its interval, if it has any."""
    limits = sorted(sign * limit for limit in interval or () if limit is not None)
    shown = f"{sign * value:,}" if isinstance(value, int) else f"{sign * value:{form}}"
    return f"{shown} ({' to '.join(f'{limit:{form}}' for limit in limits)})" if limits else shown


# ---------------------------------------------------------------- names that others chose


def names_of(value: Any) -> str:
    """Return the names of a key's datasets as Markdown."""
    return ", ".join(plain(shortened(name)) for name in source_names(value))


def source_names(value: Any) -> list[str]:
    """Return the names of a key's datasets: a name, a source with a name, or a list of these."""
    return [getattr(source, "name", source) for source in listed(value)]


def plain(text: str) -> str:
    """Return Markdown that shows ``text`` as it is, on one line, behind other words of that line."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", line)


def fenced(text: str) -> str:
    """Return a block of code that ``text`` cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"


# ---------------------------------------------------------------- metadata


def card_head(
    config: Config, task: str, tag: str, figures: Mapping[str, Any], intervals: Mapping[str, Sequence[float | None]]
) -> str:
    """Return the YAML head of a card: it names the base model and datasets only if they can be on the hub."""
    import huggingface_hub

    held_out = source_names(config.eval_dataset_name or config.dataset_name)
    results = [
        huggingface_hub.EvalResult(
            task_type=task,
            dataset_type=next(iter(hub_names(held_out)), "custom"),
            dataset_name=" ".join(f"held-out rows of {', '.join(map(shortened, held_out))}".split()),
            metric_type=name,
            metric_value=value,
            metric_args={"interval_95": list(intervals[name])} if intervals.get(name) else None,
        )
        for name, value in figures.items()
        if value is not None
    ]
    data = huggingface_hub.ModelCardData(
        base_model=next(iter(hub_names([config.model_name_or_path])), None),
        datasets=hub_names(source_names(config.dataset_name)) or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["irlfast", tag],
        model_name=redacted((config.hub_model_id or f"irlfast-{config.method}").split("/")[-1]),
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def hub_names(names: Sequence[Any]) -> list[str]:
    """Return the names that are valid on the hub and are no files or folders here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    valid = []
    for name in names:
        if name is None or find_path(name) or is_local(name):
            continue
        try:
            validate_repo_id(name)
        except HFValidationError:
            continue
        valid.append(name)
    return valid
