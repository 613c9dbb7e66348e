"""The metrics that a run reports: add a metric here, and the page, the closing table and the model card show it.

``HELD_OUT`` lists the values of ``eval.json``, which ``evaluation/heldout.py`` measures. ``TRAINING`` lists the panels
of the values in ``metrics.jsonl``, which a loss or ``engine/`` logs; ``SPEED`` lists the columns of the table of speed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class HeldOutMetric(NamedTuple):
    """A value of ``eval.json``: a column of the page's table, and perhaps a panel and a column of the model card."""

    key: str  # the name in eval.json
    column: str  # the head of the column on the page
    form: str  # how the page writes a value
    panel: str = ""  # the title of the panel over the phases of the run; empty for no panel
    unit: str = ""  # below the title
    level: float | None = None  # a horizontal line to compare with
    card: str = ""  # the head of the column in the closing table and the model card; empty for no column
    card_form: str = ".3f"
    card_sign: int = 1  # -1: these show the value with the other sign


HELD_OUT = (
    HeldOutMetric("exact_match", "exact match ↑", ".1%", "Exact match", "share of prompts", card="exact match"),
    HeldOutMetric(
        "reward_accuracy",
        "reward accuracy ↑",
        ".1%",
        "Reward accuracy",
        "share of pairs; line: chance",
        level=0.5,
        card="reward accuracy",
    ),
    HeldOutMetric("margin", "margin, nats ↑", ",.2f", "Reward margin", "nats", level=0.0),
    HeldOutMetric(
        "nll",
        "nll, nats ↓",
        ",.2f",
        "Demonstration nll",
        "nats per answer; lower is better",
        card="demonstration log-likelihood (nats)",
        card_sign=-1,
    ),
    HeldOutMetric("nll_per_token", "nll per token ↓", ".3f", "Demonstration nll per token", "nats; lower is better"),
    HeldOutMetric(
        "answer_length", "answer, tokens", ",.1f", "Answer length", "tokens", card="answer tokens", card_form=".1f"
    ),
    HeldOutMetric("preference_gap", "gap, nats ↑", ",.2f", "Log-probability gap", "nats, chosen − rejected", level=0.0),
    HeldOutMetric(
        "preference_accuracy",
        "preference accuracy ↑",
        ".1%",
        "Preference accuracy",
        "share of pairs, chosen above rejected; line: chance",
        level=0.5,
    ),
    HeldOutMetric("count", "prompts", ",.0f"),
    HeldOutMetric("seconds", "evaluation, s", ",.1f"),
)


def measured_in(evals: dict[str, dict[str, Any]]) -> list[HeldOutMetric]:
    """Return the held-out metrics that at least one policy has."""
    return [metric for metric in HELD_OUT if any(row.get(metric.key) is not None for row in evals.values())]


class TrainingMetric(NamedTuple):
    """A panel of one or two values of ``metrics.jsonl`` over the steps of the run."""

    panel: str
    unit: str
    keys: tuple[str, ...]  # the names in metrics.jsonl: one line, or the expert's and the synthetic answers' lines
    level: float | None = None  # a horizontal line to compare with
    optional: bool = False  # without values there is no panel; other panels say "not measured in this run"


TRAINING = (
    TrainingMetric("Reward margin", "expert − synthetic, × β", ("rewards/margins",), level=0.0),
    TrainingMetric("Reward accuracy", "share of pairs; line: chance", ("rewards/accuracies",), level=0.5),
    TrainingMetric("Demonstration log-likelihood", "nats per answer", ("logps/chosen",)),
    TrainingMetric("Loss", "", ("loss",)),
    TrainingMetric(
        "KL to the reference", "nats per answer, on the policy's samples", ("kl",), level=0.0, optional=True
    ),
    TrainingMetric(
        "Divergence from the teacher",
        "nats per answer, on the policy's samples",
        ("divergence",),
        level=0.0,
        optional=True,
    ),
    TrainingMetric("Answer length", "tokens", ("length/chosen", "length/rejected")),
    TrainingMetric("Throughput", "tokens per second", ("tokens_per_second",)),
    TrainingMetric("Memory", "GiB of the main process", ("memory_gib",), optional=True),
)
TRAINING_KEYS = [key for metric in TRAINING for key in metric.keys]


class SpeedMetric(NamedTuple):
    """A column of the table of speed: one number per phase, from a value of ``metrics.jsonl``."""

    key: str  # the name in metrics.jsonl
    column: str  # the head of the column
    form: str  # how the page writes the number
    summary: Callable[[np.ndarray], float] = np.median  # of the values of all steps


SPEED = (
    SpeedMetric("tokens_per_second", "tokens per second", ",.0f"),
    SpeedMetric("answer_tokens_per_second", "answer tokens per second", ",.0f"),
    SpeedMetric("tflops", "TFLOP per second and device", ",.3g"),
    SpeedMetric("mfu", "model FLOPs utilisation", ".1%"),
    SpeedMetric("memory_gib", "most memory, GiB", ",.2f", np.max),
)
