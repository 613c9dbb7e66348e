"""The two sets of a run as token ids: the training examples and the held-out examples."""

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.counts import SetCounts, SourceCounts
from irlfast.data.encoding import Encoder, Ids, encode
from irlfast.data.read import read_demonstrations
from irlfast.data.rows import Demonstration
from irlfast.data.sources import prompt_sources_of, sources_of
from irlfast.data.store import Example, make_examples


class Sets(NamedTuple):
    train: list[Example]
    held_out: list[Example]
    prompts: list[Example]  # without answers, from ``prompt_dataset_name``
    # "train"; "eval" if the held-out set is another source; "prompts" if there are any
    set_counts: dict[str, SetCounts]
    source_counts: list[SourceCounts]


def read_sets(config: Config, encoder: Encoder, lines: IO[str] | None = None, prompts_only: bool = False) -> Sets:
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
    held_out: list[Example] = []
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
    sets = Sets(train, held_out, [], set_counts, source_counts)
    return add_prompts(sets, config, encoder, lines, written) if config.prompt_dataset_name else sets


def add_prompts(sets: Sets, config: Config, encoder: Encoder, lines: IO[str] | None, first: int) -> Sets:
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


def collect_examples(encoded: Iterable[tuple[Demonstration, Ids]], lines: IO[str] | None, first: int) -> list[Example]:
    """Collect examples whose token ids lie in one array, and write their rows to ``lines``, for rewards that read text.

    ``first`` is the number of the first line.
    """
    tokens, lengths = array("i"), array("i")
    for row, ids in encoded:
        for sequence in ids:
            tokens.extend(sequence)
            lengths.append(len(sequence))
        if lines:
            kept = {"messages": row.prompt, "answer": row.answer, "tools": row.tools, "row": row.row}
            lines.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")
    return make_examples(memoryview(tokens), lengths, range(first, first + len(lengths) // len(Ids._fields)))


def split_held_out(config: Config, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Split off a share of ``eval_fraction``, and return the training examples and the held-out examples."""
    if len(examples) < 2:
        raise InputError(f"dataset {source_names(config)}: found 1 row, expected at least 2, one of them held out")
    shuffled = list(examples)
    random.Random(config.seed).shuffle(shuffled)
    count = max(1, min(round(config.eval_fraction * len(shuffled)), config.max_eval_samples or len(shuffled)))
    return shuffled[count:], shuffled[:count]


def remove_overlap(
    config: Config, train: list[Example], held_out: list[Example], counts: Counter[str]
) -> list[Example]:
    """Refuse, drop or allow held-out examples that are also training rows, as ``eval_overlap`` says."""
    trained = {hash((bytes(x.prompt_ids), bytes(x.answer_ids))) for x in train}
    prompts = {hash(bytes(x.prompt_ids)) for x in train}
    fresh = [x for x in held_out if hash((bytes(x.prompt_ids), bytes(x.answer_ids))) not in trained]
    overlap = len(held_out) - len(fresh)
    if overlap and config.eval_overlap == "refuse":
        raise InputError(
            f"dataset {source_names(config, held_out=True)}: {overlap:,} of {len(held_out):,} held-out rows are also "
            "training rows; expected other rows, or eval_overlap: drop, which leaves them out, or allow"
        )
    if config.eval_overlap == "drop":
        counts["also_in_train"], held_out = overlap, fresh
        if not held_out:
            raise InputError(f"dataset {source_names(config, held_out=True)}: all its rows are also training rows")
    counts["prompts_also_in_train"] = sum(hash(bytes(x.prompt_ids)) in prompts for x in held_out)
    return held_out


def fresh_prompts(
    config: Config, prompts: list[Example], train: list[Example], held_out: list[Example], counts: Counter[str]
) -> list[Example]:
    """Leave out prompts that demonstrations have. Refuse, drop or allow held-out ones, as ``eval_overlap`` says."""
    names = ", ".join(source.name for source in prompt_sources_of(config))
    answered, evaluated = ({hash(bytes(x.prompt_ids)) for x in examples} for examples in (train, held_out))
    unanswered = [x for x in prompts if hash(bytes(x.prompt_ids)) not in answered]
    fresh = [x for x in unanswered if hash(bytes(x.prompt_ids)) not in evaluated]
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
