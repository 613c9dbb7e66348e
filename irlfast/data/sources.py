"""Where rows come from: files, folders, saved datasets, the hub. Rows are read one by one, never held together.

A row comes with its place, as ``train.jsonl, line 3``. What is no row, such as a line that is not JSON, comes as the
:class:`BadRow` that says so. Text stays text as it is written, whatever it looks like.
"""

import contextlib
import glob
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from irlfast.common.files import ENDINGS, PACKED, InputError, ending, find, is_glob, is_local
from irlfast.config.schema import Config, Dataset
from irlfast.data.formats import clean, read_file
from irlfast.data.reading import Reading
from irlfast.data.rows import BadRow

SPLITS = {  # words in the names of files and folders, as Hugging Face datasets has them
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
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}\.")  # Hugging Face's names: the split is what stands before
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
READABLE = f"{', '.join(ENDINGS)}, or these with {' or '.join(PACKED)}"


class Source(NamedTuple):
    """One source of a run's rows."""

    name: str
    split: str | None  # None: what a held-out source has, its test or validation split or its only one
    weight: float | None = None
    config: str | None = None
    columns: Mapping[Any, str] | None = None


def sources_of(config: Config, held_out: bool = False) -> list[Source]:
    """The sources to learn from, or the held-out ones: ``eval_dataset_name``, else the test split of the same."""
    given = config.eval_dataset_name if held_out and config.eval_dataset_name else config.dataset_name
    items = given if isinstance(given, list) else [given] if given else []
    entries = [Dataset(item) if isinstance(item, str) else item for item in items]
    split = config.dataset_test_split if held_out else config.dataset_train_split
    same = held_out and not config.eval_dataset_name  # a source's own split is the one to learn from
    return [
        Source(
            entry.name,
            split if same else entry.split or split,
            entry.weight,
            entry.config or config.dataset_config,
            entry.columns or config.columns,
        )
        for entry in entries
    ]


def read_rows(config: Config, source: Source, reading: Reading) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Rows of a source with the place of each.

    Raises:
        InputError: that there is no such source or split, or a file cannot be read; it names both.
    """
    place = locate(source.name)
    if place is None:
        yield from hub_rows(config, source)
    elif isinstance(place, Path) and any((place / name).exists() for name in ("dataset_dict.json", "state.json")):
        yield from saved_rows(place, source)
    else:
        for path in files_of(place, source, reading):
            with readable(str(path)):
                yield from ((f"{path}, {where}", row) for where, row in read_file(path))


def locate(name: str) -> Path | list[Path] | None:
    """The path or the files that a name means; None where only the hub may have it."""
    path = find(name)
    if path:
        return path
    if is_glob(name):
        matches = map(Path, sorted(glob.glob(str(Path(name).expanduser()), recursive=True)))
        found = [match for match in matches if match.is_file()]
        if found:
            return found
    if is_local(name):
        raise InputError(f"dataset {name}: no such file or folder")
    return None


@contextlib.contextmanager
def readable(place: str) -> Iterator[None]:
    """An error of a file's reader becomes one sentence: each format has errors of its own, and so has the network."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{place}: cannot be read ({reason[:500]})") from error


# ---------------------------------------------------------------- files


def files_of(place: Path | list[Path], source: Source, reading: Reading) -> list[Path]:
    """The files of the split of a file, a folder or a pattern."""
    if isinstance(place, Path) and not place.is_dir():
        check_ending(place)
        return chosen_split({"train": [place]}, source)
    if isinstance(place, list):
        for path in place:
            check_ending(path)
        splits, unnamed = split_files(place, Path())
        if len(splits) < 2:  # whatever the names are, the pattern says which files are meant
            return chosen_split({"train": place}, source)
    else:
        splits, unnamed = split_files(files_in(place, source), place)
        if not splits:
            splits, unnamed = {"train": unnamed}, []
    if unnamed:
        reading.notes["files ignored, whose names tell no split"] = len(unnamed)
    return chosen_split(splits, source)


def check_ending(path: Path) -> None:
    if not ending(path.name)[0]:
        raise InputError(f"{path}: found a file that ends in {path.suffix or 'nothing'!r}, expected {READABLE}")


def files_in(folder: Path, source: Source) -> list[Path]:
    """The files of rows in a folder, or in that of its configuration."""
    if source.config:
        folder = folder / source.config
        if not folder.is_dir():
            raise InputError(
                f"dataset {source.name}: found no folder {source.config!r} in it, which dataset_config names"
            )
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if ending(path.name)[0] and path.is_file() and path.name not in NO_ROWS and not is_hidden(path, folder)
    ]
    if not found:
        raise InputError(f"dataset {folder}: found no file that ends in {READABLE}")
    return found


def is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def split_files(paths: list[Path], folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Files by the split that their names tell, and the others."""
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in paths:
        name = split_named(path, folder)
        (splits.setdefault(name, []) if name else unnamed).append(path)
    return splits, unnamed


def split_named(path: Path, folder: Path) -> str | None:
    shard = SHARD.match(path.name)
    if shard:
        return SPLITS.get(shard.group(1), shard.group(1))
    inside = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    words = [word for part in reversed(inside.parts) for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def chosen_split(splits: dict[str, Any], source: Source) -> Any:
    """The part of ``splits`` that a source names."""
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


def saved_rows(folder: Path, source: Source) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Rows of what ``save_to_disk`` wrote."""
    import datasets

    with readable(f"dataset {folder}"):
        saved = datasets.load_from_disk(str(folder))
        splits = {**saved} if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        yield from numbered(chosen_split(splits, source), str(folder))


def hub_rows(config: Config, source: Source) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    import datasets

    with readable(f"dataset {source.name}, split {source.split!r}"):
        keys: dict[str, Any] = {"revision": config.dataset_revision, "streaming": config.streaming}
        found = datasets.load_dataset(source.name, source.config, split=source.split, **keys)
        yield from numbered(found if source.split else chosen_split({**found}, source), source.name)


def numbered(rows: Iterable[dict], name: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    yield from ((f"{name}, row {number}", clean(row)) for number, row in enumerate(rows, 1))
