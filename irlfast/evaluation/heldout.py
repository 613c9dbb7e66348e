"""Measure a policy on held-out demonstrations: exact match, likelihood of the demonstrations, reward accuracy."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import read_json, write_json, write_jsonl
from irlfast.data.packing import PromptGroup
from irlfast.data.store import TokenIds
from irlfast.runs.run import Run
from irlfast.sampling.generation import DRAWN, GREEDY, prompt_of, sample
from irlfast.sampling.scoring import log_ratios, score


def evaluate(run: Run, folder: Path, policy: Path | str, first_folder: Path, first: Path | str) -> dict[str, Any]:
    """Measure ``policy`` on the held-out demonstrations, and keep the metrics in ``folder/eval.json``.

    - ``exact_match``: the share of greedy answers that equal the expert's text.
    - ``nll``: nats per demonstration. ``nll_per_token``: nats per token.
    - ``reward_accuracy``: the share of (expert, fresh sample of the run's ``first`` policy) pairs with a positive
      margin, and ``margin``: the mean margin in nats. Equal pairs do not count. The first policy is the reference, so
      the first policy itself has neither.
    - With rejected answers, ``preference_gap``: log π(chosen) − log π(rejected) in nats, and
      ``preference_accuracy``: the share of pairs whose margin to the first policy is positive.

    ``reports/metrics.py`` lists the metrics that the report shows.
    """
    path = folder / "eval.json"
    if path.exists():
        return read_json(path)
    begun = time.perf_counter()
    greedy = sample(run, policy, run.held_out, folder / "greedy", GREEDY)
    drawn = sample(run, first, run.held_out, first_folder / "drawn", DRAWN)
    pairs = [PromptGroup(x.prompt_ids, (x.answer_ids, answer)) for x, answer in zip(run.held_out, drawn, strict=True)]
    scores = score(run, policy, pairs, folder / "held_out.safetensors")
    answers = [
        {"prompt": prompt_of(run, example), "expert": text(run, example.answer_ids), "answer": text(run, answer)}
        for example, answer in zip(run.held_out, greedy, strict=True)
    ]
    metrics: dict[str, Any] = {
        "phase": folder.name,
        "exact_match": mean([row["expert"] == row["answer"] for row in answers]),
        "nll": mean([-expert.sum().item() for expert, _ in scores]),
        "nll_per_token": -torch.cat([expert for expert, _ in scores]).mean().item(),
        "reward_accuracy": None,
        "margin": None,
        "answer_length": mean([len(answer) for answer in greedy]),
        "count": len(answers),
    }
    if folder != first_folder:
        ref_scores = score(run, first, pairs, first_folder / "held_out.safetensors")
        differ = [pair.answers[0] != pair.answers[1] for pair in pairs]
        margins = [margin(*both) for *both, differs in zip(scores, ref_scores, differ, strict=True) if differs]
        if margins:
            metrics |= {"reward_accuracy": mean([value > 0 for value in margins]), "margin": mean(margins)}
    metrics |= preferences(run, folder, policy, first_folder, first)
    if dist.is_main():
        run.metrics_log.write_held_out(metrics, answers)
        write_jsonl(folder / "answers.jsonl", answers)
        write_json(path, metrics | {"seconds": time.perf_counter() - begun})
    dist.barrier()
    return metrics


def preferences(run: Run, folder: Path, policy: Path | str, first_folder: Path, first: Path | str) -> dict[str, float]:
    """Measure the policy on held-out (chosen, rejected) pairs, if there are any."""
    pairs = [PromptGroup(x.prompt_ids, (x.answer_ids, x.rejected_ids)) for x in run.held_out if x.rejected_ids]
    if not pairs:
        return {}
    scores = score(run, policy, pairs, folder / "preferences.safetensors")
    metrics = {"preference_gap": mean([(chosen.sum() - rejected.sum()).item() for chosen, rejected in scores])}
    if folder != first_folder:
        ref_scores = score(run, first, pairs, first_folder / "preferences.safetensors")
        margins = [margin(*both) for both in zip(scores, ref_scores, strict=True)]
        metrics["preference_accuracy"] = mean([value > 0 for value in margins])
    return metrics


def text(run: Run, ids: TokenIds) -> str:
    return run.encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()


def margin(logps: tuple[Tensor, ...], ref_logps: tuple[Tensor, ...]) -> float:
    """Return ρ(expert) − ρ(synthetic)."""
    expert, synthetic = log_ratios(logps, ref_logps).tolist()
    return expert - synthetic


def mean(values: list) -> float:
    return sum(values) / len(values)
