"""Find the rows of a dataset: in files, folders, saved datasets or on the hub. Rows are read one by one.

Every row comes with its place, such as ``train.jsonl, line 3``. Something that is no row, such as a line that is not
JSON, comes as a :class:`BadRow` that says why. Texts stay as written: no reader turns "007" or "null" into a value.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from irlfast.common.files import (
    COMPRESSIONS,
    ENDINGS,
    InputError,
    find_path,
    home_path,
    is_glob,
    is_local,
    row_file_ending,
)
from irlfast.config.schema import Config
from irlfast.config.types import Dataset, Datasets
from irlfast.data.counts import SourceCounts
from irlfast.data.file_formats import drop_null_keys, read_file
from irlfast.data.rows import BadRow

SPLITS = {  # words in the names of files and folders that name a split, as in Hugging Face datasets
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}\.")  # Hugging Face's names of shards, which begin with the split
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
READABLE = f"{', '.join(ENDINGS)}, or these with {' or '.join(COMPRESSIONS)}"


class Source(NamedTuple):
    """One source of a run's rows."""

    name: str
    split: str | None  # None for a held-out source: its test split, its validation split or its only split
    weight: float | None = None
    config: str | None = None
    columns: Mapping[Any, str] | None = None


def sources_of(config: Config, held_out: bool = False) -> list[Source]:
    """Return the sources to learn from, or the held-out sources.

    The held-out sources are ``eval_dataset_name``, or else the test split of ``dataset_name``.
    """
    given = config.eval_dataset_name if held_out and config.eval_dataset_name else config.dataset_name
    split = config.dataset_test_split if held_out else config.dataset_train_split
    ignore_own_split = held_out and not config.eval_dataset_name  # a source's own split is the one to learn from
    sources = named_sources(config, given, split)
    return [source._replace(split=split) for source in sources] if ignore_own_split else sources


def prompt_sources_of(config: Config) -> list[Source]:
    """Return the sources of prompts without answers."""
    return named_sources(config, config.prompt_dataset_name, config.dataset_train_split)


def named_sources(config: Config, given: Datasets | None, split: str | None) -> list[Source]:
    """Return the sources that a key names; those that name no split of their own have ``split``."""
    items = given if isinstance(given, list) else [given] if given else []
    entries = [Dataset(item) if isinstance(item, str) else item for item in items]
    return [
        Source(
            entry.name,
            entry.split or split,
            entry.weight,
            entry.config or config.dataset_config,
            entry.columns or config.columns,
        )
        for entry in entries
    ]


def all_sources(config: Config) -> list[Source]:
    """Return every source that a run may read."""
    return [*sources_of(config), *sources_of(config, held_out=True), *prompt_sources_of(config)]


def files_of(source: Source) -> list[Path] | None:
    """Return the local files that the source's rows and splits are read from; None for a dataset on the hub."""
    place = locate(source.name)
    if not isinstance(place, Path):
        return place
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def read_rows(config: Config, source: Source, counts: SourceCounts) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Read the rows of a source, each with its place.

    Raises:
        InputError: the source or the split is missing, or a file cannot be read.
    """
    place = locate(source.name)
    if place is None:
        yield from read_hub(config, source)
    elif isinstance(place, Path) and any((place / name).exists() for name in ("dataset_dict.json", "state.json")):
        yield from read_saved(place, source)
    else:
        for path in files_of_split(place, source, counts):
            name = str(path)
            with explain_read_errors(name):
                yield from ((f"{name}, {where}", row) for where, row in read_file(path))


def locate(name: str) -> Path | list[Path] | None:
    """Return the path or the files that a name means, or None for a dataset that only the hub may have."""
    path = find_path(name)
    if path:
        return path
    if is_glob(name):
        matches = map(Path, sorted(glob.glob(str(home_path(name)), recursive=True)))
        files = [match for match in matches if match.is_file()]
        if files:
            return files
    if is_local(name):
        raise InputError(f"dataset {name}: no such file or folder")
    return None


@contextlib.contextmanager
def explain_read_errors(place: str) -> Iterator[None]:
    """Turn any error of a file's reader into one sentence. Each format and the network have errors of their own."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{place}: cannot be read ({reason[:500]})") from error


# ---------------------------------------------------------------- files


def files_of_split(place: Path | list[Path], source: Source, counts: SourceCounts) -> list[Path]:
    """Return the files of the source's split, from one file, a folder, or the files that match a pattern."""
    if isinstance(place, Path) and not place.is_dir():
        check_ending(place)
        return choose_split({"train": [place]}, source)
    if isinstance(place, list):
        for path in place:
            check_ending(path)
        splits, unnamed = group_by_split(place, Path())
        if len(splits) < 2:  # the pattern says which files are meant, whatever their names
            return choose_split({"train": place}, source)
    else:
        splits, unnamed = group_by_split(list_files(place, source), place)
        if not splits:
            splits, unnamed = {"train": unnamed}, []
    if unnamed:
        counts.notes["files ignored, whose names tell no split"] = len(unnamed)
    return choose_split(splits, source)


def check_ending(path: Path) -> None:
    if not row_file_ending(path.name)[0]:
        raise InputError(f"{path}: found a file that ends in {path.suffix or 'nothing'!r}, expected {READABLE}")


def list_files(folder: Path, source: Source) -> list[Path]:
    """Return the files of rows in a folder, or in its subfolder that ``dataset_config`` names."""
    if source.config:
        whole, folder = folder, folder / source.config
        if not os.path.isdir(folder) or not folder.resolve().is_relative_to(whole.resolve()):
            raise InputError(
                f"dataset {source.name}: found no folder {source.config!r} in it, which dataset_config names"
            )
    with explain_read_errors(f"dataset {folder}"):
        files = [path for path in sorted(folder.rglob("*")) if is_row_file(path, folder)]
    if not files:
        raise InputError(f"dataset {folder}: found no file that ends in {READABLE}")
    return files


def is_row_file(path: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    has_ending = bool(row_file_ending(path.name)[0])
    return has_ending and path.is_file() and path.name not in METADATA_FILES and not is_hidden


def group_by_split(paths: list[Path], folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Group files by the split in their names, and return the files without a split beside them."""
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in paths:
        name = guess_split(path, folder)
        if name:
            splits.setdefault(name, []).append(path)
        else:
            unnamed.append(path)
    return splits, unnamed


def guess_split(path: Path, folder: Path) -> str | None:
    """Return the split that the name of a file tells, or else the name of the nearest folder above it."""
    shard = SHARD.match(path.name)
    if shard:
        return SPLITS.get(shard.group(1), shard.group(1))
    inside = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    words = [word for part in reversed(inside.parts) for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def choose_split(splits: dict[str, Any], source: Source) -> Any:
    """Return the value of ``splits`` for the split that the source names."""
    names = [source.split, SPLITS.get(source.split, source.split)] if source.split else held_out_names(splits)
    for name in names:
        if name in splits:
            return splits[name]
    wanted = f"no split {source.split!r}" if source.split else "neither a split 'test' nor 'validation'"
    raise InputError(f"dataset {source.name}: found {wanted}, expected one that it has: {', '.join(map(repr, splits))}")


def held_out_names(splits: Iterable[str]) -> list[str]:
    names = [*splits]
    return ["test", "validation", *(names if len(names) == 1 else [])]


# ---------------------------------------------------------------- Hugging Face datasets


def read_saved(folder: Path, source: Source) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Read a folder that ``Dataset.save_to_disk`` wrote."""
    import datasets

    with explain_read_errors(f"dataset {folder}"):
        saved = datasets.load_from_disk(str(folder))
        splits = {**saved} if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        rows = choose_split(splits, source)
        rows.data.validate(full=True)  # a damaged file would crash the process
        yield from number_rows(rows, str(folder))


def read_hub(config: Config, source: Source) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    import datasets

    with explain_read_errors(f"dataset {source.name}{f', split {source.split!r}' if source.split else ''}"):
        keys: dict[str, Any] = {"revision": config.dataset_revision, "streaming": config.streaming}
        loaded = datasets.load_dataset(source.name, source.config, split=source.split, **keys)
        yield from number_rows(loaded if source.split else choose_split({**loaded}, source), source.name)


def number_rows(rows: Iterable[dict], name: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    yield from ((f"{name}, row {number}", drop_null_keys(row)) for number, row in enumerate(rows, 1))
