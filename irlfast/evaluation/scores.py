"""Scores of answers by others than the model itself: reward models, implicit rewards, and functions of the user.

Reward models judge as in AfD (Inverse-RLignment, arXiv 2405.15624). All models answer with at most the same number of
new tokens, and demonstrations are cut to it. A reward counts from that of the demonstration: the mean of
r(answer) − r(demonstration) says how far a model is from the demonstrations, which have 0. It is a difference and no
ratio, as the logits of a reward model have no zero.
"""

import functools
import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.config.methods import OWN_POLICIES
from irlfast.data.packing import PromptGroup
from irlfast.data.plain_template import join_turns
from irlfast.evaluation.texts import load_scorer
from irlfast.runs.run import Run
from irlfast.sampling.reward_function import function_rewards
from irlfast.sampling.reward_texts import row_of
from irlfast.sampling.rewards import implicit_reward, reward_of, summed
from irlfast.startup.limits import check_rewards

Answers = Sequence[Sequence[int]]  # token ids
Figures = dict[str, float]


def check_scores(config: Config) -> None:
    """Check the rewards and the scorers of an evaluation.

    Raises:
        InputError: a reward cannot be loaded, an implicit reward names a policy of a run itself, or a scorer cannot be
            imported.
    """
    for name in {*config.implicit_reward_policy, *config.implicit_reward_reference} & {*OWN_POLICIES}:
        raise InputError(
            f"implicit_reward_policy, implicit_reward_reference: found {name!r}, a policy of a run itself; expected "
            "the folder of a model"
        )
    check_rewards(config)
    for name in config.scorer:
        load_scorer(name)


def add_scores(run: Run, rows: Sequence[dict[str, Any]], answers: Sequence[Answers], folder: Path) -> None:
    """Add rewards and the user's scores to the figures of each row, and to those of its samples.

    ``answers`` are the token ids of each prompt's greedy answer and of its samples. ``folder`` keeps the rewards. Every
    process scores its share for the rewards; the main process alone calls the scorers.
    """
    add_rewards(run, rows, answers, folder)
    for scorer in map(load_scorer, run.config.scorer if dist.is_main() else []):
        for example, row in zip(run.held_out, rows, strict=True):
            given = row_of(run, example.row)
            prompt = join_turns(given["messages"])
            texts = [row["answer"], *row["samples"]]
            own, *others = [scorer(prompt, text, row["expert"], given["row"]) for text in texts]
            put(row, own, others)


def put(row: dict[str, Any], own: Figures, others: Sequence[Figures]) -> None:
    """Put the figures of the greedy answer and of the samples into a row; None where a sample lacks one."""
    row["figures"] |= own
    for name in dict.fromkeys(name for figures in others for name in figures):
        row["sample_figures"][name] = [figures.get(name) for figures in others]


# ---------------------------------------------------------------- rewards


def add_rewards(run: Run, rows: Sequence[dict[str, Any]], answers: Sequence[Answers], folder: Path) -> None:
    """Add every reward of the configuration to the rows.

    ``reward/NAME`` counts from the reward of the prompt's demonstration. A prompt without one has ``raw_reward/NAME``.
    """
    longest = run.config.max_new_tokens
    groups = [
        # Each group has as many answers: without a demonstration, the greedy answer stands in its place, unread.
        PromptGroup(x.prompt_ids, (x.answer_ids[:longest] or own[0], *own), row=x.row)
        for x, own in zip(run.held_out, answers, strict=True)
    ]
    for name, values in rewards(run, groups, folder).items():
        per_prompt = values.view(len(groups), -1).tolist()
        for example, row, (demonstration, *own) in zip(run.held_out, rows, per_prompt, strict=True):
            key, zero = (f"reward/{name}", demonstration) if example.answer_ids else (f"raw_reward/{name}", 0.0)
            first, *others = [{} if math.isnan(value - zero) else {key: value - zero} for value in own]
            put(row, first, others)


def rewards(run: Run, groups: Sequence[PromptGroup], folder: Path) -> dict[str, Tensor]:
    """Return each reward of all answers ``[S]`` fp64 by its name; a model of several heads has their mean."""
    config = run.config
    implicit = zip_longest(config.implicit_reward_policy, config.implicit_reward_reference)
    scorers: dict[str, Callable[..., Sequence[Tensor]]] = {
        **{name: functools.partial(reward_of, run, name) for name in config.reward_model_name_or_path},
        **{f"implicit {both[0]}": functools.partial(implicit_reward, run, *both) for both in implicit},
    }
    paths = (folder / f"reward-{number}.safetensors" for number in range(len(scorers) + len(config.reward_function)))
    values = {name: summed(scorer(groups, next(paths))).mean(1) for name, scorer in scorers.items()}
    return values | {name: function_rewards(run, name, groups, next(paths))[:, 0] for name in config.reward_function}
