"""The two sets of a run, in token ids: examples to learn from, and held-out ones."""

import json
import random
from array import array
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.encoding import Encoder, Ids, Tally, encode
from irlfast.data.read import read_demonstrations
from irlfast.data.reading import Reading
from irlfast.data.rows import Demonstration
from irlfast.data.sources import sources_of
from irlfast.data.store import Example, examples_of


class Sets(NamedTuple):
    train: list[Example]
    held_out: list[Example]
    tallies: dict[str, Tally]  # "train" and, where it is another source, "eval"
    readings: list[Reading]


def read_sets(config: Config, encoder: Encoder, lines: IO[str] | None = None, prompts_only: bool = False) -> Sets:
    """Read and encode both sets; every kept row becomes one of ``lines``, of which an example's ``row`` is the number.

    The held-out set is another source, another split, or a share of the rows. With ``prompts_only`` there is none, and
    rows need no answer.

    Raises:
        InputError: a bad row, a set without rows, or held-out rows that are also training rows.
    """
    tallies = {"train": Tally()}
    readings: list[Reading] = []
    apart = bool(config.eval_dataset_name or config.dataset_test_split) and not prompts_only
    found = read_demonstrations(
        config, sources_of(config), readings, limit=config.max_train_samples, prompts_only=prompts_only
    )
    train = collected(encode(found, encoder, config, tallies["train"]), lines, 0)
    held_out: list[Example] = []
    if apart:
        tallies["eval"] = Tally()
        sources = sources_of(config, held_out=True)
        found = read_demonstrations(config, sources, readings, limit=config.max_eval_samples)
        held_out = collected(encode(found, encoder, config, tallies["eval"]), lines, len(train))
    for name, part in (("training", train), ("held-out", held_out)):
        if not part and (name == "training" or apart):
            raise InputError(f"dataset {names(config, name == 'held-out')}: no {name} row is left; expected some")
    if apart:
        held_out = not_in_training(config, train, held_out, tallies["eval"])
    elif not prompts_only:
        train, held_out = shared_out(config, train)
    return Sets(train, held_out, tallies, readings)


def names(config: Config, held_out: bool = False) -> str:
    return ", ".join(source.name for source in sources_of(config, held_out))


def tokenizer_texts(config: Config) -> Iterator[str]:
    """The training rows as plain texts, to train a tokenizer on."""
    for row in read_demonstrations(config, sources_of(config), [], limit=config.max_train_samples):
        prompt = "\n\n".join(str(message.get("content") or "") for message in row.prompt)
        yield config.prompt_template.replace("{}", prompt) + str((row.answer or {}).get("content") or "")


def collected(encoded: Iterable[tuple[Demonstration, Ids]], lines: IO[str] | None, first: int) -> list[Example]:
    """Examples whose ids lie in one array; their rows, for rewards that read text, become lines from ``first`` on."""
    tokens, lengths = array("i"), array("i")
    for row, ids in encoded:
        for piece in ids:
            tokens.extend(piece)
            lengths.append(len(piece))
        if lines:
            kept = {"messages": row.prompt, "answer": row.answer, "tools": row.tools, "row": row.row}
            lines.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")
    return examples_of(memoryview(tokens), lengths, range(first, first + len(lengths) // len(Ids._fields)))


def shared_out(config: Config, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to learn from, and a share of ``eval_fraction`` that is held out."""
    if len(examples) < 2:
        raise InputError(f"dataset {names(config)}: found 1 row, expected at least 2, one of them held out")
    shuffled = list(examples)
    random.Random(config.seed).shuffle(shuffled)
    count = max(1, min(round(config.eval_fraction * len(shuffled)), config.max_eval_samples or len(shuffled)))
    return shuffled[count:], shuffled[:count]


def not_in_training(config: Config, train: list[Example], held_out: list[Example], tally: Tally) -> list[Example]:
    """The held-out examples; ``eval_overlap`` says what becomes of those that are training rows, too."""
    known = {hash((bytes(x.prompt_ids), bytes(x.answer_ids))) for x in train}
    prompts = {hash(bytes(x.prompt_ids)) for x in train}
    fresh = [x for x in held_out if hash((bytes(x.prompt_ids), bytes(x.answer_ids))) not in known]
    both = len(held_out) - len(fresh)
    if both and config.eval_overlap == "refuse":
        raise InputError(
            f"dataset {names(config, held_out=True)}: {both:,} of {len(held_out):,} held-out rows are also "
            "training rows; expected other rows, or eval_overlap: drop, which leaves them out, or allow"
        )
    if config.eval_overlap == "drop":
        tally.counts["also_in_train"], held_out = both, fresh
        if not held_out:
            raise InputError(f"dataset {names(config, held_out=True)}: all its rows are also training rows")
    tally.counts["prompts_also_in_train"] = sum(hash(bytes(x.prompt_ids)) in prompts for x in held_out)
    return held_out
