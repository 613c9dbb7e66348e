"""Measure a policy on held-out demonstrations: exact match, likelihood of the demonstrations, reward accuracy."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import read_json, write_json, write_jsonl
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, TokenIds
from irlfast.runs.run import Run
from irlfast.sampling.generation import DRAWN, GREEDY, Sampling, prompt_of, sample
from irlfast.sampling.scoring import log_ratios, score
from irlfast.sampling.thoughts import answering, think


def evaluate(run: Run, folder: Path, policy: Path | str, first_folder: Path, first: Path | str) -> dict[str, Any]:
    """Measure ``policy`` on the held-out demonstrations, and keep the metrics in ``folder/eval.json``.

    - ``exact_match``: the share of greedy answers that equal the expert's text.
    - ``nll``: nats per demonstration. ``nll_per_token``: nats per token.
    - ``reward_accuracy``: the share of (expert, fresh sample of the run's ``first`` policy) pairs with a positive
      margin, and ``margin``: the mean margin in nats. Equal pairs do not count. The first policy is the reference, so
      the first policy itself has neither.
    - With rejected answers, ``preference_gap``: log π(chosen) − log π(rejected) in nats, and
      ``preference_accuracy``: the share of pairs whose margin to the first policy is positive.

    A method that thinks samples a thought to each prompt first, and what is measured follows the thought: a greedy one
    before the greedy answer, a drawn one before the likelihoods. ``nll`` is then a bound, whose expectation is at least
    the policy's own: E_z[−log π(y|x,z)] ≥ −log E_z[π(y|x,z)].

    ``reports/metrics.py`` lists the metrics that the report shows.
    """
    path = folder / "eval.json"
    if path.exists():
        return read_json(path)
    begun = time.perf_counter()
    asked = examples_for(run, policy, folder / "greedy-thoughts", GREEDY)
    greedy = sample(answering(run), policy, asked, folder / "greedy", GREEDY)
    first_examples = examples_for(run, first, first_folder / "drawn-thoughts", DRAWN)
    drawn = sample(answering(run), first, first_examples, first_folder / "drawn", DRAWN)
    pairs = pairs_of(examples_for(run, policy, folder / "drawn-thoughts", DRAWN), drawn)
    scores = score(run, policy, pairs, folder / "held_out.safetensors")
    answers = [
        {"prompt": prompt_of(run, example), "expert": text(run, told.answer_ids), "answer": text(run, answer)}
        for example, told, answer in zip(run.held_out, asked, greedy, strict=True)
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
        ref_scores = score(run, first, pairs_of(first_examples, drawn), first_folder / "held_out.safetensors")
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


def examples_for(run: Run, policy: Path | str, folder: Path, how: Sampling) -> list[Example]:
    """Return the held-out examples; if the method thinks, with a thought of the policy at the end of each prompt."""
    return think(run, policy, run.held_out, folder, how) if run.config.facts.thinks else run.held_out


def pairs_of(examples: list[Example], answers: list[TokenIds]) -> list[PromptGroup]:
    """Make the prompt groups (prompt, (expert, answer))."""
    return [PromptGroup(x.prompt_ids, (x.answer_ids, answer)) for x, answer in zip(examples, answers, strict=True)]


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
