"""The tasks, as a literal table, and their files: what the policy starts from, learns from, and is measured on.

A task has four sets of rows. SFT learns from ``start`` before the comparison. Every method then learns from ``pool``.
``validation`` chooses the learning rates, and ``test`` is read once, after that. The first two differ from seed to
seed; the last two do not.
"""

import random
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.protocol.generate import Row, sums, two_modes, with_wrong_answers
from irlfast.common.files import InputError, read_jsonl, write_jsonl

VALIDATION_SEED = 1_000_003  # of generated held-out rows; training rows are drawn by the run's own seed


class Task(NamedTuple):
    title: str
    claim: str  # the published claim that the task tests
    source: str  # the function or file that the rows come from
    judge: str  # the figures of an answer: see figures.py
    start: int  # rows of the start's SFT
    start_steps: int
    pool: int | None  # further rows that the methods learn from; None: the start's rows again
    steps: int  # of SFT continued, which set the budget
    wrong: float = 0.0  # share of training rows whose answer is that of another prompt
    unanswered: int = 0  # further prompts, without answers
    size: int = 0  # of a generated row: digits or letters
    seeds: int = 5
    rates: tuple[float, ...] = (3e-5, 2e-4, 1e-3)
    policy: dict[str, int] = {}  # noqa: RUF012  # keys of its configuration; none: those of the size
    keys: dict[str, Any] = {}  # noqa: RUF012  # of its runs


WORDS = {"max_prompt_length": 48, "max_length": 80, "max_new_tokens": 32}
CHARACTERS = {"train_tokenizer": 258}  # no merges: a token per character
DIALOGUES = {"max_prompt_length": 64, "max_length": 128, "max_new_tokens": 64, "train_tokenizer": 1024}
PROBLEMS = {"max_prompt_length": 48, "max_length": 112, "max_new_tokens": 64, "train_tokenizer": 1024}


def llama(width: int, layers: int) -> dict[str, int]:
    """Return the keys of a policy's configuration; a head has 32 numbers."""
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
    return {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers} | heads


TASKS = {
    "few": Task(
        "Pronunciations, 500 demonstrations, a saturated SFT policy",
        "SPIN (2401.01335) and IRFT (2405.17888): once SFT has converged, more SFT does not "
        "help, and learning against the policy's own answers does.",
        *("cmudict", "words", 500, 200, None, 32),
        keys=WORDS,
    ),
    "noisy": Task(
        "Pronunciations, 30% of the experts' answers are answers to other words",
        "IRFT (2405.17888) and Inverse-RLignment (2405.15624): a learned reward sees through bad "
        "demonstrations, which SFT imitates.",
        *("cmudict", "words", 6000, 200, None, 32),
        wrong=0.3,
        keys=WORDS,
    ),
    "unanswered": Task(
        "Pronunciations, 1,000 demonstrations, and 8,000 words without an answer",
        "Inverse-RLignment (2405.15624) and GAD (2511.10643): on-policy methods learn from prompts alone.",
        *("cmudict", "words", 1000, 200, None, 32),
        unanswered=8000,
        keys=WORDS,
    ),
    "sums": Task(
        "Sums of three digits, with the steps of column addition",
        "Inverse-RLignment (2405.15624) and SDFT (2601.19897): on long answers, SFT's errors compound, and "
        "on-policy learning corrects them.",
        *("sums", "sums", 4000, 220, 4000, 24),
        size=3,
        keys=CHARACTERS | {"max_prompt_length": 16, "max_length": 64, "max_new_tokens": 48},
    ),
    "modes": Task(
        "An expert with two modes, and a policy too small for both",
        "Inverse-RLignment (2405.15624) and f-MAX (1911.02256): forward KL covers both modes and writes "
        "invalid answers between them, reverse KL keeps to valid ones.",
        *("modes", "modes", 6000, 300, None, 48),
        size=5,
        policy=llama(64, 2),
        keys=CHARACTERS | {"max_prompt_length": 16, "max_length": 24, "max_new_tokens": 8},
    ),
    "plenty": Task(
        "Pronunciations, plenty of demonstrations",
        "IRFT (2405.17888) and SPIN: self-play beats SFT continued on the same data.",
        *("cmudict", "words", 16000, 250, 8000, 32),
        keys=WORDS,
    ),
    "harmless": Task(
        "HH harmless: the gap in log-probability between chosen and rejected answers",
        "IRFT (2405.17888, figure 2): methods that see only chosen answers widen the gap, and SFT does not.",
        *("hh_harmless", "gap", 1400, 40, None, 10),
        seeds=3,
        keys=DIALOGUES,
    ),
    "gsm8k": Task(
        "GSM8K, likelihood of the held-out solutions",
        "DFT (2508.05629) and SPIN (2401.01335): better use of the same solutions. The policy is too small to "
        "solve a problem.",
        *("gsm8k", "text", 3000, 40, None, 8),
        seeds=3,
        keys=PROBLEMS,
    ),
    "few-2000": Task(
        "Pronunciations, 2,000 demonstrations, a saturated SFT policy",
        "As `few`, with four times as many demonstrations.",
        *("cmudict", "words", 2000, 200, None, 32),
        keys=WORDS,
    ),
    "noisy-10": Task(
        "Pronunciations, 10% of the experts' answers are answers to other words",
        "As `noisy`, with a third of the wrong answers.",
        *("cmudict", "words", 6000, 200, None, 32),
        wrong=0.1,
        keys=WORDS,
    ),
}


class Size(NamedTuple):
    """A setting: how much of the table's numbers is done."""

    times: float  # start_steps and steps are multiplied by it
    seeds: int | None  # None: the task's
    validation: int  # rows
    test: int
    rates: int  # of the task's rates, from the middle one on
    policy: dict[str, int]  # keys of the policy's configuration, except for the small policy of `modes`


SIZES = {
    "quick": Size(0.0, 2, 8, 16, 1, llama(128, 2)),
    "hour": Size(1, None, 300, 600, 3, llama(128, 2)),
    "full": Size(10, 10, 1000, 1300, 3, llama(256, 4)),
}


def files_of(name: str, seed: int, root: Path) -> dict[str, Path]:
    """Return set -> file of a task for a seed; all seeds share the held-out sets."""
    own = {part: root / name / f"seed-{seed}" / f"{part}.jsonl" for part in ("start", "pool", "all")}
    if TASKS[name].unanswered:
        own["prompts"] = root / name / f"seed-{seed}" / "prompts.jsonl"
    return own | {part: root / name / f"{part}.jsonl" for part in ("validation", "test")}


def write_files(name: str, size: Size, seed: int, data: Path | None, root: Path) -> None:
    """Write the files of a task for a seed, unless they are there."""
    files = files_of(name, seed, root)
    if not all(path.exists() for path in files.values()):
        for part, rows in read_rows(TASKS[name], size, seed, data).items():
            write_jsonl(files[part], rows)


def read_rows(task: Task, size: Size, seed: int, data: Path | None) -> dict[str, list[Row]]:
    """Return set -> rows. No prompt of a held-out set is in a training set, except where two of a file are equal."""
    wanted = task.start + (task.pool or 0) + task.unanswered
    train, held_out = SOURCES[task.source](task, wanted, size, seed, data)
    rng = random.Random(seed)
    cut = task.start * len(train) // wanted if len(train) < wanted else task.start  # a small file has less of each
    start = train[:cut]
    pool = train[cut:][: task.pool] if task.pool else start
    if task.wrong:
        start = pool = with_wrong_answers(start, task.wrong, rng)
    rows = {"start": start, "pool": pool, "all": start if pool is start else start + pool}
    if task.unanswered:
        rows["prompts"] = [{"prompt": row["prompt"]} for row in train[len(rows["all"]) : wanted]]
    test = held_out[size.validation :][: size.test]
    return rows | {"validation": held_out[: size.validation], "test": test}


def words(task: Task, wanted: int, size: Size, seed: int, data: Path | None) -> tuple[list[Row], list[Row]]:
    """Return training rows in the seed's order, and held-out rows, from the two files of a source."""
    train = lines(data, f"{task.source}_train.jsonl")
    random.Random(seed).shuffle(train)
    return train[:wanted], lines(data, f"{task.source}_test.jsonl")


def harmless(task: Task, wanted: int, size: Size, seed: int, data: Path | None) -> tuple[list[Row], list[Row]]:
    rows = lines(data, "hh_harmless_test.jsonl")
    held_out = min(size.validation + size.test, len(rows) // 2)
    train = rows[held_out:]
    random.Random(seed).shuffle(train)
    return train[:wanted], rows[:held_out]


def generated(task: Task, wanted: int, size: Size, seed: int, data: Path | None) -> tuple[list[Row], list[Row]]:
    """Return training rows drawn by the seed, without the prompts of the held-out rows, which all seeds share."""
    make = {"sums": sums, "modes": two_modes}[task.source]
    held_out = make(size.validation + size.test, task.size, random.Random(VALIDATION_SEED))
    prompts = {row["prompt"] for row in held_out}
    train = make(wanted + len(held_out), task.size, random.Random(seed))
    return [row for row in train if row["prompt"] not in prompts][:wanted], held_out


SOURCES = {"cmudict": words, "gsm8k": words, "hh_harmless": harmless, "sums": generated, "modes": generated}


def lines(data: Path | None, name: str) -> list[Row]:
    if data is None:
        raise InputError(f"--data: found none, expected the folder of {name}")
    return [row for _, row in read_jsonl(data / name)]
