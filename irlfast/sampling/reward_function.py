"""Rewards by a Python function, which is called as TRL's GRPOTrainer calls its reward functions.

``function(prompts=…, completions=…, completion_ids=…, **columns)`` returns a number for each answer, or None for an
answer that it does not judge. ``columns`` are lists of the rows' other columns. If a row is a conversation, its prompt
is a list of messages and its completion a list of one assistant message; else both are texts.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError, find_path
from irlfast.data.packing import PromptGroup
from irlfast.runs.run import Run
from irlfast.sampling.reward_texts import cached, row_of, text_of

ANSWERS_PER_CALL = 64  # about
NOT_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")  # as with TRL


def function_rewards(run: Run, name: str, groups: Sequence[PromptGroup], path: Path) -> Tensor:
    """Return one reward of every answer, ``[S, 1]`` fp64, kept in ``path``; NaN if the function returned None.

    Raises:
        InputError: the function cannot be imported, raises, or returns something else than a number or None for each
            answer.
    """

    def share() -> dict[int, float]:
        function, n = load_function(name, "reward_function"), len(groups[0].answers)
        rewards: dict[int, float] = {}
        groups_per_call = max(1, ANSWERS_PER_CALL // n)
        starts = range(0, len(groups), groups_per_call)
        for start in starts[dist.rank() :: dist.world_size()]:
            values = call(function, name, run, groups[start : start + groups_per_call])
            rewards |= dict(enumerate(values, start * n))
        return rewards

    return cached(path, share)


def load_function(name: str, key: str) -> Callable:
    """Import ``package.module:function`` or ``file.py:function``, as a program in the working folder would.

    ``key`` is the key of the configuration that names the function.

    Raises:
        InputError: the function cannot be imported.
    """
    place, _, attribute = name.rpartition(":")
    path = find_path(place) if place.endswith(".py") else None
    folder = str(path.resolve().parent if path else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = import_file(path) if path else importlib.import_module(place)
        function = getattr(module, attribute)
    except Exception as error:  # the user's module may raise anything
        raise InputError(f"{key} {name}: cannot be imported ({describe(error)})") from error
    if not callable(function):
        raise InputError(f"{key} {name}: found {type(function).__name__}, expected a function")
    return function


def import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(function: Callable, name: str, run: Run, groups: Sequence[PromptGroup]) -> list[float]:
    """Return the function's rewards of all answers of some prompt groups; NaN for None.

    Raises:
        InputError: the function raises, or returns something else than a number or None for each answer.
    """
    rows = [row for group in groups for row in [row_of(run, group.row)] * len(group.answers)]
    answers = [answer for group in groups for answer in group.answers]
    texts = [text_of(run, answer) for answer in answers]
    names = {column: None for row in rows for column in row["row"] if column not in NOT_COLUMNS}
    columns = {column: [row["row"].get(column) for row in rows] for column in names}
    given = {
        "prompts": [row["messages"] if is_conversation(row) else row["messages"][-1]["content"] for row in rows],
        "completions": [
            [{"role": "assistant", "content": text}] if is_conversation(row) else text
            for row, text in zip(rows, texts, strict=True)
        ],
        "completion_ids": [[*answer] for answer in answers],
    }
    try:
        returned = function(**given, **columns)
        values = list(asyncio.run(returned) if inspect.iscoroutine(returned) else returned)
    except Exception as error:  # the user's function may raise anything
        raise InputError(f"reward_function {name}: it failed ({describe(error)})") from error
    if len(values) != len(answers):
        raise InputError(
            f"reward_function {name}: found {len(values)} rewards, expected {len(answers)}, one per answer"
        )
    return [to_number(value, f"reward_function {name}", text) for value, text in zip(values, texts, strict=True)]


def is_conversation(row: dict[str, Any]) -> bool:
    """Return whether a row has messages, or a prompt of several turns besides system text."""
    lists = (value for value in row["row"].values() if isinstance(value, list) and value)
    turns = [message for message in row["messages"] if message["role"] != "system"]
    return len(turns) != 1 or any(isinstance(value[0], dict) and {"role", "from"} & {*value[0]} for value in lists)


def to_number(value: Any, function: str, answer: str) -> float:
    """Return what a function gave an answer as a number, and NaN for None.

    Raises:
        InputError: the value is no finite number.
    """
    if value is None:
        return math.nan
    try:
        reward = float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if isinstance(value, str) or not math.isfinite(reward):
        raise InputError(f"{function}: found {value!r} for the answer {answer[:80]!r}, expected a number")
    return reward


def describe(error: BaseException) -> str:
    """Return an error's type, its message, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f", {Path(last.filename).name} line {last.lineno}" if last else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
