"""The prompts of an evaluation: rows of a dataset, encoded for every model and written to files chunk by chunk.

The number of prompts may be large, so memory holds one chunk of them at a time.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from irlfast.common.artefacts import intact, keep, keep_json
from irlfast.common.files import InputError, read_json, write, write_jsonl
from irlfast.common.messages import log
from irlfast.common.secrets import redacted
from irlfast.config import Config
from irlfast.data.counts import SetCounts, SourceCounts, describe_set, describe_source, dropped_rows
from irlfast.data.encoding import BATCH, Encoder, Ids, encode
from irlfast.data.hashes import Hashes
from irlfast.data.plain_template import join_turns
from irlfast.data.read import read_demonstrations
from irlfast.data.rows import Demonstration
from irlfast.data.sets import collect_examples
from irlfast.data.sources import sources_of
from irlfast.data.store import save_examples

PART = 256  # prompts of a file of rows; a divisor of CHUNK
CHUNK = 2048  # prompts that a model answers and scores each time it is loaded

Encoded = tuple[Demonstration, list[Ids]]  # a row, and its token ids by each encoder


class Reader(NamedTuple):
    """How one or several models read a row."""

    encoder: Encoder
    config: Config
    counts: SetCounts
    kept: Hashes  # hashes of the rows that are kept


def write_prompts(output: Path, config: Config, readers: Sequence[Reader], begun: str) -> int:
    """Encode the rows of the dataset, write them to ``output``, and return their number.

    ``prompts.jsonl`` has the texts, ``data/rows.jsonl`` the rows as they were read, and ``data/READER/CHUNK`` the token
    ids of a chunk of prompts. ``begun`` is the time that chat templates write.

    Raises:
        InputError: a bad row, no row, or other rows than those that the evaluation began with.
    """
    facts_path = output / "data.json"
    sources: list[SourceCounts] = []
    rows = read_demonstrations(
        config, sources_of(config, held_out=True), sources, limit=config.max_eval_samples, prompts_only=True
    )
    facts: dict[str, Any] = {}
    write(output / "data", lambda folder: facts.update(write_chunks(folder, encode_for_all(rows, readers), readers)))
    lines = [line for reader in readers for line in describe_set("prompts", reader.counts)]
    facts |= {"begun": begun, "remarks": [*map(describe_source, sources), *lines]}
    if not facts["count"]:
        raise InputError(f"dataset_name {config.dataset_name}: no row is left; expected some ({facts['remarks'][-1]})")
    earlier = read_json(facts_path) if intact(facts_path) else facts
    other = f"output_dir {output}: its evaluation began with other prompts; expected a new output_dir"
    if earlier["fingerprint"] != facts["fingerprint"]:
        raise InputError(other)
    keep(output / "prompts.jsonl", (output / "data" / "prompts.jsonl").replace, other)
    dropped = [*dropped_rows(sources), *(row for reader in readers for row in reader.counts.dropped)]
    write_jsonl(output / "data" / "dropped.jsonl", redacted(dropped))
    keep_json(facts_path, redacted(facts))
    for remark in facts["remarks"]:
        log(remark)
    return facts["count"]


def encode_for_all(rows: Iterable[Demonstration], readers: Sequence[Reader]) -> Iterator[Encoded]:
    """Yield each row that every reader keeps, with its token ids by each."""
    stream = iter(rows)
    while batch := list(itertools.islice(stream, BATCH)):
        each = [
            {row.where: ids for row, ids in encode(batch, *reader)}  # a template may change a row, but not its place
            for reader in readers
        ]
        for row in batch:
            if all(row.where in ids for ids in each):
                yield row, [ids.pop(row.where) for ids in each]


def write_chunks(folder: Path, encoded: Iterator[Encoded], readers: Sequence[Reader]) -> dict[str, Any]:
    """Write all files of the prompts, and return their number and the hash of their files."""
    digest, count = hashlib.sha256(), 0
    folder.mkdir()
    rows_path, texts_path = folder / "rows.jsonl", folder / "prompts.jsonl"
    with rows_path.open("wb") as lines, texts_path.open("w", encoding="utf-8") as texts:
        while chunk := list(itertools.islice(encoded, CHUNK)):
            for number, reader in enumerate(readers):
                own = [(row, ids[number]) for row, ids in chunk]
                examples = collect_examples(own, None if number else lines, count)
                path = chunk_path(folder, number, count)
                save_examples(path, examples)
                digest.update(path.read_bytes())
                if number == 0:
                    for row, ids in own:
                        texts.write(json.dumps(prompt_row(reader, row, ids), ensure_ascii=False) + "\n")
            count += len(chunk)
    return {"count": count, "fingerprint": digest.hexdigest()[:16]}


def chunk_path(folder: Path, reader: int, first: int) -> Path:
    """Return the file of a reader's token ids; ``first`` is the number of the chunk's first prompt."""
    return folder / f"reader-{reader}" / f"{first:08d}.safetensors"


def prompt_row(reader: Reader, row: Demonstration, ids: Ids) -> dict[str, str | None]:
    """Return the texts of a prompt: as a person reads it, without the template."""
    decode = reader.encoder.tokenizer.decode
    expert, rejected = (decode(each, skip_special_tokens=True).strip() if each else None for each in ids[1:3])
    return {"prompt": join_turns(row.prompt), "expert": expert, "rejected": rejected}
