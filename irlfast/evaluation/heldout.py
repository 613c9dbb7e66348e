"""Measure the policies of a run on its held-out demonstrations, after each phase."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json, keep_jsonl
from irlfast.common.files import read_json
from irlfast.evaluation.figures import figure_of
from irlfast.evaluation.measure import Subject, measure
from irlfast.evaluation.table import interval_of
from irlfast.runs.run import Run
from irlfast.sampling.generation import begin
from irlfast.sampling.shards import DRAWN, GREEDY, Request
from irlfast.sampling.thoughts import thinking

# The metrics of eval.json, and the figures of which they are means.
FIGURE_OF = {
    "exact_match": "exact_match",
    "nll": "nll",
    "nll_per_token": "nll_per_token",
    "reward_accuracy": "reward_accuracy",
    "margin": "margin",
    "preference_gap": "preference_gap",
    "preference_accuracy": "preference_accuracy",
    "answer_length": "length",
}


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

    ``intervals`` has the 95% interval of each of these, ``[low, high]``, over prompts.

    ``reports/metrics.py`` lists the metrics that the report shows.
    """
    path = folder / "eval.json"
    if is_evaluated(folder):
        return read_json(path)
    begun = begin(*(request.folder for request in held_out_asks(run, folder, is_first=folder == first_folder)))
    rows = measure(Subject(run, policy, folder), Subject(run, first, first_folder), DRAWN, count=1, own=False)
    metrics = {"phase": folder.name} | summary(rows)
    if dist.is_main():
        run.metrics_log.write_held_out(metrics, rows)
        keep_jsonl(folder / "answers.jsonl", rows)
        keep_json(path, metrics | {"seconds": time.perf_counter() - begun})
    dist.barrier()
    return metrics


def is_evaluated(folder: Path) -> bool:
    return dist.on_main(lambda: intact(folder / "eval.json") and intact(folder / "answers.jsonl"))


def held_out_asks(run: Run, folder: Path, is_first: bool) -> list[Request]:
    """List the answers that :func:`evaluate` asks of a policy, unless it has measured the policy already.

    A policy that thinks is asked for its thoughts alone, since the answers follow them.
    """
    if is_evaluated(folder):
        return []
    if run.config.facts.thinks:
        kinds = {"greedy-thoughts": GREEDY, "drawn-thoughts": DRAWN}
        return [Request(thinking(run), run.held_out, 1, folder / name, how) for name, how in kinds.items()]
    kinds = {"greedy": GREEDY, "drawn": DRAWN} if is_first else {"greedy": GREEDY}
    return [Request(run, run.held_out, 1, folder / name, how) for name, how in kinds.items()]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of all rows, with their intervals. The likelihood per token is the mean over all tokens."""
    tokens = np.array([len(row["expert_tokens"]) for row in rows])
    metrics: dict[str, Any] = {"reward_accuracy": None, "margin": None, "count": len(rows)}
    intervals = {}
    for key, name in FIGURE_OF.items():
        values = np.array([row["figures"].get(name, np.nan) for row in rows])
        if not np.isnan(values).all():
            measured = interval_of(name, values, tokens, figure_of(name).share)
            metrics[key], intervals[key] = measured["mean"], [measured["low"], measured["high"]]
    return metrics | {"intervals": intervals}
