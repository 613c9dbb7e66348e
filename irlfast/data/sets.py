"""The two sets of a run as token ids: the training examples and the held-out examples."""

import json
import mmap
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np

from irlfast.common.files import InputError, check_end
from irlfast.config import Config
from irlfast.data.counts import SetCounts, SourceCounts
from irlfast.data.encoding import Encoder, Ids, encode
from irlfast.data.read import read_demonstrations
from irlfast.data.rows import Demonstration
from irlfast.data.sources import prompt_sources_of, sources_of
from irlfast.data.store import NONE, Example, Examples, make_examples

BUFFER = 2**18  # token ids that are written at a time
ROW_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, default=str)


class Sets(NamedTuple):
    train: Examples
    held_out: Examples
    prompts: Examples  # without answers, from ``prompt_dataset_name``
    # "train"; "eval" if the held-out set is another source; "prompts" if there are any
    set_counts: dict[str, SetCounts]
    source_counts: list[SourceCounts]


def read_sets(config: Config, encoder: Encoder, lines: IO[bytes] | None = None, prompts_only: bool = False) -> Sets:
    """Read and encode all sets. Write every kept row to ``lines``; an example's ``row`` is the number of its line.

    The held-out set is another source, another split, or a share of the rows. With ``prompts_only`` the held-out set
    is empty, and rows need no answer.

    Raises:
        InputError: a bad row, a set without rows, or held-out rows that are also training rows.
    """
    set_counts = {"train": SetCounts()}
    source_counts: list[SourceCounts] = []
    has_own_source = bool(config.eval_dataset_name or config.dataset_test_split) and not prompts_only
    rows = read_demonstrations(
        config, sources_of(config), source_counts, limit=config.max_train_samples, prompts_only=prompts_only
    )
    train = collect_examples(encode(rows, encoder, config, set_counts["train"]), lines, 0)
    held_out = NONE
    if has_own_source:
        set_counts["eval"] = SetCounts()
        sources = sources_of(config, held_out=True)
        rows = read_demonstrations(config, sources, source_counts, limit=config.max_eval_samples)
        held_out = collect_examples(encode(rows, encoder, config, set_counts["eval"]), lines, len(train))
    written = len(train) + len(held_out)
    if not train:
        raise InputError(f"dataset {source_names(config)}: no training row is left; expected some")
    if has_own_source and not held_out:
        raise InputError(f"dataset {source_names(config, held_out=True)}: no held-out row is left; expected some")
    if has_own_source:
        held_out = remove_overlap(config, train, held_out, set_counts["eval"].counts)
    elif not prompts_only:
        train, held_out = split_held_out(config, train)
    sets = Sets(train, held_out, NONE, set_counts, source_counts)
    return add_prompts(sets, config, encoder, lines, written) if config.prompt_dataset_name else sets


def add_prompts(sets: Sets, config: Config, encoder: Encoder, lines: IO[bytes] | None, first: int) -> Sets:
    """Add the prompts of ``prompt_dataset_name``. An answer that a row has is not read. ``first`` is the first line.

    Raises:
        InputError: a bad row, or no prompt is left.
    """
    sets.set_counts["prompts"] = counts = SetCounts()
    rows = read_demonstrations(config, prompt_sources_of(config), sets.source_counts, prompts_only=True)
    alone = (row._replace(answer=None, rejected=None) for row in rows)
    prompts = collect_examples(encode(alone, encoder, config, counts), lines, first)
    return sets._replace(prompts=fresh_prompts(config, prompts, sets.train, sets.held_out, counts.counts))


def source_names(config: Config, held_out: bool = False) -> str:
    return ", ".join(source.name for source in sources_of(config, held_out))


def tokenizer_texts(config: Config) -> Iterator[str]:
    """Return the training rows as plain texts, to train a tokenizer on."""
    for row in read_demonstrations(config, sources_of(config), [], limit=config.max_train_samples):
        prompt = "\n\n".join(str(message.get("content") or "") for message in row.prompt)
        yield config.prompt_template.replace("{}", prompt) + str((row.answer or {}).get("content") or "")


def collect_examples(encoded: Iterable[tuple[Demonstration, Ids]], lines: IO[bytes] | None, first: int) -> Examples:
    """Collect examples whose token ids lie in a temporary file, which is mapped into memory.

    Write their rows to ``lines``, for rewards that read text. ``first`` is the number of the first line.
    """
    tokens, lengths, end = array("i"), array("i"), lines.tell() if lines else 0
    with tempfile.TemporaryFile() as file:
        for row, ids in encoded:
            for sequence in ids:
                tokens.fromlist(sequence)
            lengths.extend(map(len, ids))
            if len(tokens) > BUFFER:
                file.write(tokens)
                del tokens[:]
            if lines:
                kept = {"messages": row.prompt, "answer": row.answer, "tools": row.tools, "row": row.row}
                end += lines.write((ROW_ENCODER.encode(kept) + "\n").encode())
        file.write(tokens)
        check_end(file, 4 * sum(lengths))
        if lines:
            check_end(lines, end)
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b"")
    count = len(lengths) // len(Ids._fields)
    rows = np.arange(first, first + count, dtype=np.int32)
    return make_examples(mapped.cast("i"), np.array(lengths, dtype=np.int32), rows)


def split_held_out(config: Config, examples: Examples) -> tuple[Examples, Examples]:
    """Split off a share of ``eval_fraction``, and return the training examples and the held-out examples."""
    if len(examples) < 2:
        raise InputError(f"dataset {source_names(config)}: found 1 row, expected at least 2, one of them held out")
    numbers = array("i", range(len(examples)))
    random.Random(config.seed).shuffle(numbers)
    shuffled = examples[np.array(numbers)]
    count = max(1, min(round(config.eval_fraction * len(shuffled)), config.max_eval_samples or len(shuffled)))
    return shuffled[count:], shuffled[:count]


def hashes(examples: Examples, part: Callable[[Example], object]) -> np.ndarray:
    """Return a hash ``[n]`` int64 of a part of each example."""
    return np.fromiter((hash(part(x)) for x in examples), np.int64, len(examples))


def prompt_of(example: Example) -> bytes:
    return bytes(example.prompt_ids)


def prompt_and_answer(example: Example) -> tuple[bytes, bytes]:
    return bytes(example.prompt_ids), bytes(example.answer_ids)


def remove_overlap(config: Config, train: Examples, held_out: Examples, counts: Counter[str]) -> Examples:
    """Refuse, drop or allow held-out examples that are also training rows, as ``eval_overlap`` says."""
    trained = np.isin(hashes(held_out, prompt_and_answer), hashes(train, prompt_and_answer))
    fresh, overlap = held_out[~trained], int(trained.sum())
    if overlap and config.eval_overlap == "refuse":
        raise InputError(
            f"dataset {source_names(config, held_out=True)}: {overlap:,} of {len(held_out):,} held-out rows are also "
            "training rows; expected other rows, or eval_overlap: drop, which leaves them out, or allow"
        )
    if config.eval_overlap == "drop":
        counts["also_in_train"], held_out = overlap, fresh
        if not held_out:
            raise InputError(f"dataset {source_names(config, held_out=True)}: all its rows are also training rows")
    counts["prompts_also_in_train"] = int(np.isin(hashes(held_out, prompt_of), hashes(train, prompt_of)).sum())
    return held_out


def fresh_prompts(
    config: Config, prompts: Examples, train: Examples, held_out: Examples, counts: Counter[str]
) -> Examples:
    """Leave out prompts that demonstrations have. Refuse, drop or allow held-out ones, as ``eval_overlap`` says."""
    names = ", ".join(source.name for source in prompt_sources_of(config))
    unanswered = prompts[~np.isin(hashes(prompts, prompt_of), hashes(train, prompt_of))]
    fresh = unanswered[~np.isin(hashes(unanswered, prompt_of), hashes(held_out, prompt_of))]
    counts["also_demonstrations"] = len(prompts) - len(unanswered)
    counts["also_held_out"] = overlap = len(unanswered) - len(fresh)
    if overlap and config.eval_overlap == "refuse":
        raise InputError(
            f"prompt_dataset_name {names}: {overlap:,} of {len(prompts):,} prompts are also held out; expected other "
            "prompts, or eval_overlap: drop, which leaves them out, or allow"
        )
    kept = unanswered if config.eval_overlap == "allow" else fresh
    if not kept:
        raise InputError(f"prompt_dataset_name {names}: no prompt is left; expected some without a demonstration")
    return kept
