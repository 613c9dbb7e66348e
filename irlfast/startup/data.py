"""The prepared data of a run, in ``data/``: made once, and used again by a resumed run that would make the same.

``data.json`` says what it was made from. A resumed run compares that with what it has now: the content of each file of
rows, whose checksum is computed again only where length or time differ, and one checksum of all else.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import IO, Any

import irlfast
from irlfast.common.artefacts import intact, keep, keep_json, keep_jsonl, keep_text, notes
from irlfast.common.files import check_written
from irlfast.common.secrets import redacted
from irlfast.config import Config
from irlfast.config.checks import PER_STAGE
from irlfast.data.counts import describe_set, describe_source, dropped_rows
from irlfast.data.encoding import Encoder
from irlfast.data.sets import Sets
from irlfast.data.sources import all_sources, files_of
from irlfast.data.store import Examples, load_examples, save_examples
from irlfast.runs.output import MAY_CHANGE, RATES
from irlfast.startup.inputs import fingerprint as fingerprint_of_file
from irlfast.startup.inputs import sums_of

FORMAT = 1  # of the prepared data: another number makes resumed runs prepare it anew
PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")  # with irlfast, they read and tokenise rows
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_there(config: Config, output: Path) -> bool:
    """Return whether the prepared data is there, and intact."""
    names = [*(f"{name}.safetensors" for name in set_names(config)), "rows.jsonl", "dropped.jsonl"]
    names += ["tokenizer.json"] if config.train_tokenizer else []
    damaged = [name for name in names if not intact(output / "data" / name)]  # each of them is set aside
    return not damaged


def set_names(config: Config) -> list[str]:
    """Return the names of the files of examples, without their ending."""
    return ["train", "eval", *(["prompts"] if config.prompt_dataset_name else [])]


def load_data(config: Config, output: Path) -> list[Examples]:
    """Load the training set, the held-out set and, if there are any, the prompts without answers."""
    return [load_examples(output / "data" / f"{name}.safetensors") for name in set_names(config)]


def origin_of(config: Config, encoder: Encoder, prompts_only: bool, earlier: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the prepared data is made from: ``files`` and the checksum ``settings``.

    None means that nothing tells whether the content is the same: that of a dataset on the hub without a commit as
    ``dataset_revision``, or of a tokenizer that is not of the library ``tokenizers``.
    """
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    paths = [files_of(source) for source in all_sources(config)]
    if backend is None or (None in paths and not COMMIT.fullmatch(config.dataset_revision or "")):
        return None
    same = {*MAY_CHANGE, *RATES, *PER_STAGE, "stages"}  # keys that may change in a run, and shape no row
    keys = {name: value for name, value in dataclasses.asdict(config).items() if name not in same}
    versions = [irlfast.__version__, *map(importlib.metadata.version, PACKAGES)]
    template = encoder.template._replace(tokenizer=encoder.tokenizer.chat_template)
    settings = [FORMAT, versions, keys, prompts_only, backend.to_str(), template, encoder[2:]]
    known = earlier.get("files", {})
    files = {str(path): fingerprint_of_file(path, known.get(str(path))) for each in paths for path in each or ()}
    text = json.dumps(settings, default=str, sort_keys=True)
    return {"files": files, "settings": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()}


def is_same(origin: dict[str, Any] | None, earlier: dict[str, Any] | None) -> bool:
    """Return whether two origins have the same settings, and files of the same contents."""
    if not origin or not earlier:
        return False
    return origin["settings"] == earlier["settings"] and sums_of(origin["files"]) == sums_of(earlier["files"])


def keep_data(
    config: Config, output: Path, encoder: Encoder, sets: Sets, rows: IO[bytes], facts: dict[str, Any]
) -> list[str]:
    """Write the prepared data, and ``data.json`` with ``facts`` and more. Return lines that describe the data."""
    folder = output / "data"
    other = f"output_dir {output}: its run began with other demonstrations; expected a new output_dir"
    keep(folder / "rows.jsonl", functools.partial(copy_lines, rows), other)
    for name, examples in zip(set_names(config), (sets.train, sets.held_out, sets.prompts), strict=False):
        keep(folder / f"{name}.safetensors", functools.partial(save_examples, examples=examples), other)
    dropped = [*dropped_rows(sets.source_counts), *(row for tally in sets.set_counts.values() for row in tally.dropped)]
    keep_jsonl(folder / "dropped.jsonl", redacted(dropped))
    if config.train_tokenizer:
        keep_text(folder / "tokenizer.json", encoder.tokenizer.backend_tokenizer.to_str(pretty=True))
    lines = describe(sets)
    facts |= {
        "fingerprint": fingerprint(config, folder),
        "remarks": lines,
        **{name: dict(tally.counts) for name, tally in sets.set_counts.items()},
    }
    keep_json(output / "data.json", redacted(facts))
    return lines


def fingerprint(config: Config, folder: Path) -> str:
    """Hash the checksums of the files of examples: the report shows which data a run learned from."""
    noted = notes(folder)
    sums = [noted[f"{name}.safetensors"]["."][1] for name in set_names(config)]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


def copy_lines(lines: IO[bytes], path: Path) -> None:
    lines.seek(0)
    with path.open("wb") as copied:
        shutil.copyfileobj(lines, copied)
    check_written(path, lines.tell())


def describe(sets: Sets) -> list[str]:
    """Describe what was read, kept, cut and left out, one line each."""
    lines = [describe_source(source) for source in sets.source_counts]
    labels = {"train": "demonstrations", "eval": "held out", "prompts": "prompts without answers"}
    for name, tally in sets.set_counts.items():
        lines += describe_set(labels[name], tally)
    if "eval" not in sets.set_counts and sets.held_out:
        lines.append(f"held out: {len(sets.held_out):,} of these rows")
    return lines
