"""The end of a run: ``final/`` with its model card, the closing table, and the report."""

import copy
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep
from irlfast.common.files import copy_folder, read_json, write_json, write_text
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.engine.process_group import destroy_process_group
from irlfast.models.load import load_model, save_pretrained
from irlfast.models.lora import base_and_adapter, merge
from irlfast.models.saved import check_saved
from irlfast.reports.card import COLUMNS, cell, policy_card, reward_card
from irlfast.reports.page import write_report
from irlfast.runs.hub import upload
from irlfast.runs.run import Run

WEIGHTS = ".safetensors"  # files that nothing here changes once they are written


def finish(run: Run, policies: dict[str, Path | str], metrics: list[dict[str, Any]]) -> None:
    """Write ``final/`` and ``report.html``, print the closing table, and push to the hub if asked."""
    kept, why = choose(run.config, metrics)
    final = run.output / "final"
    if dist.is_main():
        if not intact(final) or read_json(final / "policy.json") != policy_json(kept, why, metrics):
            keep(final, lambda temporary: save_final(temporary, run, policies, kept, why, metrics))
        report = write_report(run.output)
        print_table(metrics, kept)
        log(f"policy: {final} (from {kept}: {why})")
        log(f"report: {report}")
        if run.config.push_to_hub:
            upload(run.config, final)
    destroy_process_group()


def finish_reward(run: Run, reward: Path) -> None:
    """Write ``final/``, a reward model that ``AutoModelForSequenceClassification`` loads."""
    final = run.output / "final"
    if dist.is_main():
        metrics = read_json(reward.parent / "eval.json")
        if not intact(final):
            keep(final, lambda temporary: save_reward(temporary, run, reward, metrics))
        log(f"reward model: {final}")
        if run.config.push_to_hub:
            upload(run.config, final)
    destroy_process_group()


def save_reward(folder: Path, run: Run, reward: Path, metrics: dict[str, Any]) -> None:
    copy_folder(reward, folder, linked=WEIGHTS)
    write_text(folder / "README.md", reward_card(run.config, read_json(run.output / "data.json"), metrics))


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


def save_final(
    folder: Path, run: Run, policies: dict[str, Path | str], kept: str, why: str, metrics: list[dict[str, Any]]
) -> None:
    policy = policies[kept]
    if isinstance(policy, Path) and not base_and_adapter(policy)[1]:
        copy_folder(policy, folder, linked=WEIGHTS if run.output in policy.parents else "")
    else:
        save_pretrained(folder, merge(load_model(policy, run.config), str(policy)), run.encoder.tokenizer)
    name_end_tokens(folder, run.encoder)
    write_json(folder / "policy.json", policy_json(kept, why, metrics))
    deleted = [phase for phase, path in policies.items() if isinstance(path, Path) and not path.exists()]
    data = read_json(run.output / "data.json")
    write_text(folder / "README.md", policy_card(run.config, data, kept, why, metrics, deleted))


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
    check_saved(folder, tokenizer, {})


def print_table(metrics: list[dict[str, Any]], kept: str) -> None:
    table = Table(title=f"{metrics[0]['count']:,} held-out demonstrations")
    table.add_column("after")
    for metric in COLUMNS:
        table.add_column(metric.card, justify="right")
    for row in metrics:
        table.add_row(
            row["phase"] + (" (kept)" if row["phase"] == kept else ""), *(cell(metric, row) for metric in COLUMNS)
        )
    Console(width=100).print(table)
