"""The end of a run: ``final/`` with its model card, the closing table, and the report."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import irlfast
from irlfast.common import dist
from irlfast.common.files import read_json, write, write_json, write_text
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.engine.process_group import destroy_process_group
from irlfast.models.load import load_model, save_pretrained
from irlfast.models.lora import base_and_adapter, merge
from irlfast.reports.metrics import HELD_OUT
from irlfast.reports.page import write_report
from irlfast.runs.hub import card_metadata, upload
from irlfast.runs.run import Run

COLUMNS = [metric for metric in HELD_OUT if metric.card]


def finish(run: Run, policies: dict[str, Path | str], metrics: list[dict[str, Any]]) -> None:
    """Write ``final/`` and ``report.html``, print the closing table, and push to the hub if asked."""
    kept, why = choose(run.config, metrics)
    final = run.output / "final"
    if dist.is_main():
        if not final.exists() or read_json(final / "policy.json") != policy_json(kept, why, metrics):
            write(final, lambda temporary: save_final(temporary, run, policies[kept], kept, why, metrics))
        report = write_report(run.output)
        print_table(metrics, kept)
        log(f"policy: {final} (from {kept}: {why})\nreport: {report}")
        if run.config.push_to_hub:
            upload(run.config, final)
    dist.barrier()
    destroy_process_group()


def finish_reward(run: Run, reward: Path) -> None:
    """Write ``final/``, a reward model that ``AutoModelForSequenceClassification`` loads."""
    final = run.output / "final"
    if dist.is_main():
        metrics = read_json(reward.parent / "eval.json")
        if not final.exists():
            write(final, lambda temporary: save_reward(temporary, run, reward, metrics))
        log(f"reward model: {final}")
        if run.config.push_to_hub:
            upload(run.config, final)
    dist.barrier()
    destroy_process_group()


def save_reward(folder: Path, run: Run, reward: Path, metrics: dict[str, Any]) -> None:
    shutil.copytree(reward, folder)
    write_text(folder / "README.md", reward_card(run.config, metrics))


def reward_card(config: Config, metrics: dict[str, Any]) -> str:
    numbers = {name.replace("_", " "): value for name, value in metrics.items() if name != "phase"}
    rows = "\n".join(f"| {name} | {value:,.3f} |" for name, value in numbers.items())
    return f"""{card_metadata(config, "text-classification", "reward-model")}
# A reward model learned from demonstrations with irlfast {irlfast.__version__}

Loss `{config.reward_loss}` on pairs `{config.reward_data}` of `{config.dataset_name}`, per {config.reward_level}. It
reads prompt and answer, end token included, in the policy's template; several labels are the heads of an ensemble.

| held-out | |
| --- | --- |
{rows}
"""


def choose(config: Config, metrics: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the phase whose policy is kept, and the reason."""
    if config.keep == "last":
        return metrics[-1]["phase"], "the last"
    name = config.metric_for_best_model
    sign = -1 if name == "nll" else 1
    best = max(metrics, key=lambda row: -math.inf if row[name] is None else sign * row[name])
    if best[name] is None:
        return metrics[-1]["phase"], f"the last; no phase has a held-out {name}"
    return best["phase"], f"the best held-out {name}, {best[name]:.3f}"


def policy_json(kept: str, why: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of ``policy.json``. After more stages the content differs, and ``final/`` is made again."""
    return {"kept": kept, "why": why, "phases": [row["phase"] for row in metrics]}


def save_final(folder: Path, run: Run, policy: Path | str, kept: str, why: str, metrics: list[dict[str, Any]]) -> None:
    if isinstance(policy, Path) and not base_and_adapter(policy)[1]:
        shutil.copytree(policy, folder)
    else:
        save_pretrained(folder, merge(load_model(policy, run.config), str(policy)), run.encoder.tokenizer)
    name_end_tokens(folder, run.encoder)
    write_json(folder / "policy.json", policy_json(kept, why, metrics))
    write_text(folder / "README.md", model_card(run.config, kept, why, metrics))


def name_end_tokens(folder: Path, encoder: Encoder) -> None:
    """Name the token that answers were trained to end with, so that ``generate`` and servers stop at it.

    The generation config names this token beside the model's other end tokens. The tokenizer gets it as its EOS,
    unless that would change the text that the chat template writes.
    """
    import transformers

    try:
        settings = transformers.GenerationConfig.from_pretrained(folder)
    except OSError:
        settings = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(folder))
    others = [token for token in encoder.ends if token != encoder.end_id]
    settings.eos_token_id = [encoder.end_id, *others] if others else encoder.end_id
    settings.save_pretrained(folder)
    tokenizer = copy.deepcopy(encoder.tokenizer)
    question = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = tokenizer.apply_chat_template(question, tokenize=False)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(encoder.end_id)
    if tokenizer.apply_chat_template(question, tokenize=False) == before:
        tokenizer.save_pretrained(folder)


def model_card(config: Config, kept: str, why: str, metrics: list[dict[str, Any]]) -> str:
    rows = [f"| {row['phase']} | " + " | ".join(card_cells(row)) + " |" for row in metrics]
    return f"""{card_metadata(config, "text-generation", config.method)}
# A policy trained from demonstrations with irlfast {irlfast.__version__}

Method `{config.method}` on `{config.dataset_name}`; this is the policy of `{kept}` ({why}).

| held-out, after | {" | ".join(metric.card for metric in COLUMNS)} |
| --- | {" | ".join("---" for _ in COLUMNS)} |
{chr(10).join(rows)}

Reward accuracy: the share of (demonstration, sample of the first policy) pairs whose implicit reward
log π(y|x) − log π_first(y|x) is higher for the demonstration.
"""


def card_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one phase in the closing table and the model card."""
    cells = []
    for metric in COLUMNS:
        value = row[metric.key]
        cells.append("–" if value is None else f"{metric.card_sign * value:{metric.card_form}}")
    return cells


def print_table(metrics: list[dict[str, Any]], kept: str) -> None:
    table = Table(title=f"{metrics[0]['count']:,} held-out demonstrations")
    table.add_column("after")
    for metric in COLUMNS:
        table.add_column(metric.card, justify="right")
    for row in metrics:
        table.add_row(row["phase"] + (" (kept)" if row["phase"] == kept else ""), *card_cells(row))
    Console(width=100).print(table)
