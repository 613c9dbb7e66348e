"""The figures of an evaluation: what each measures, its unit, and whether more of it is better."""

from typing import NamedTuple

import numpy as np

REWARDS = ("reward", "raw_reward")  # figures that best of n may choose by
RATIO = "from 0 to 1"  # the unit of ratios, whose points are hundredths, as those of shares are
SAMPLED = "sampled_"  # begins the name of a figure that is a mean over a prompt's samples


class Figure(NamedTuple):
    """A number that is measured for each prompt, or for each sample of a prompt."""

    title: str
    unit: str
    better: str  # "higher", "lower", or "" where neither is better
    point: float | None  # a difference that matters; None: a tenth of the baseline's standard deviation
    share: bool = False  # from 0 to 1, where a single answer has 0 or 1
    per_token: bool = False  # the mean is over the demonstrations' tokens, not over prompts


FIGURES = {
    "exact_match": Figure("exact match", "share of answers", "higher", 0.01, share=True),
    "rouge_l": Figure("ROUGE-L", RATIO, "higher", 0.01),
    "edit_distance": Figure("edit distance", "characters", "lower", 1.0),
    "edit_similarity": Figure("edit similarity", RATIO, "higher", 0.01),
    "nll": Figure("demonstration nll", "nats per answer", "lower", 0.1),
    "nll_per_token": Figure("demonstration nll per token", "nats per token", "lower", 0.01, per_token=True),
    "margin": Figure("margin", "nats", "higher", 0.1),
    "reward_accuracy": Figure("reward accuracy", "share of pairs", "higher", 0.01, share=True),
    "preference_gap": Figure("log-probability gap", "nats", "higher", 0.1),
    "preference_gap_accuracy": Figure("log-probability gap above 0", "share of pairs", "higher", 0.01, share=True),
    "preference_margin": Figure("preference margin", "nats", "higher", 0.1),
    "preference_accuracy": Figure("preference accuracy", "share of pairs", "higher", 0.01, share=True),
    "kl": Figure("KL to the baseline", "nats per answer", "", 0.1),
    "length": Figure("answer length", "tokens", "", 1.0),
    "ended": Figure("answers with an end token", "share of answers", "higher", 0.01, share=True),
    "repetition": Figure("repeated 4-grams", RATIO, "lower", 0.01),
    "distinct_1": Figure("distinct words of a prompt's samples", RATIO, "", 0.01),
    "distinct_2": Figure("distinct 2-grams of a prompt's samples", RATIO, "", 0.01),
    "self_bleu": Figure("self-BLEU of a prompt's samples", RATIO, "", 0.01),
    "reward": Figure("reward above the demonstration's", "the reward's own unit", "higher", None),
    "raw_reward": Figure("reward", "the reward's own unit", "higher", None),
    "win_rate": Figure("win rate by the judge", "share of prompts", "higher", 0.01, share=True),
}


def figure_of(name: str) -> Figure:
    """Return the figure of this name; a score of a user's own function is one whose higher values are better.

    ``sampled_`` before a name says that the figure is of samples; ``reward/NAME`` is the reward by one of several
    models.
    """
    stem, _, of = name.removeprefix(SAMPLED).partition("/")
    figure = FIGURES.get(stem, Figure(stem.replace("_", " "), "the scorer's own unit", "higher", None))
    title = figure.title + (f" by {of}" if of else "") + (", samples" if name.startswith(SAMPLED) else "")
    return figure._replace(title=title)


def is_share(name: str, values: np.ndarray) -> bool:
    """Return whether a figure is a share of yes-or-no answers; so is a user's score with no values but 0 and 1."""
    known = name.removeprefix(SAMPLED).partition("/")[0] in FIGURES
    return figure_of(name).share if known else bool((np.isin(values, (0.0, 1.0)) | np.isnan(values)).all())
