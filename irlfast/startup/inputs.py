"""The local files that shape a run beside its rows: models, tokenizer, template, reward functions.

``inputs.json`` has the length, time and SHA-256 of each. A resumed run reads a file again only where its length or time
differs. Rows need no entry here: what is made of them is in ``data/``, and is compared there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from irlfast.common.artefacts import checksum, intact, keep_json
from irlfast.common.files import InputError, find_path, read_json, resolved
from irlfast.common.secrets import hides, redacted
from irlfast.config import Config
from irlfast.config.methods import OWN_POLICIES
from irlfast.config.types import FILES, MODELS, SEVERAL_MODELS
from irlfast.models.lora import base_and_adapter
from irlfast.runs.output import MAY_CHANGE

ENDINGS = {".safetensors", ".bin", ".json", ".jinja", ".model", ".py", ".txt"}  # of the files of a model that are read

Inputs = dict[str, dict[str, list]]  # "key name" -> path in the named folder -> [length, time in ns, SHA-256]


def read_inputs(config: Config, output: Path) -> Inputs:
    """Return the run's inputs, compared with those in ``inputs.json``.

    Raises:
        InputError: a file is not as it was when the run began; the message names it.
    """
    earlier: Inputs = read_json(output / "inputs.json") if intact(output / "inputs.json") else {}
    inputs: Inputs = {}
    for key, name, place in named_places(config):
        label = f"{key} {name}"
        as_now = (files for noted, files in earlier.items() if hides(noted, label))
        before = next(as_now, None) or as_spelled_before(key, place, earlier)
        now = {file: fingerprint(place / file, before.get(file)) for file in files_at(place)}
        inputs[redacted(label)] = now
        sums = sums_of(before), sums_of(now)
        changed = sorted(file for file in sums[0].keys() | sums[1].keys() if sums[0].get(file) != sums[1].get(file))
        if earlier and changed:
            raise InputError(
                f"{label}: {place / changed[0]} is not as it was when the run in {output} began; expected the same "
                "content, or a new output_dir"
            )
    return inputs


def as_spelled_before(key: str, place: Path, earlier: Inputs) -> dict[str, list]:
    """Return what ``inputs.json`` has of a file or a folder under another spelling of its name; nothing if no such."""
    labels = (label.partition(" ") for label in earlier)
    names = (name for other, _, name in labels if other == key and resolved(name) == str(place.resolve()))
    return earlier.get(f"{key} {next(names, '')}", {})


def keep_inputs(inputs: Inputs, output: Path) -> None:
    """Write ``inputs.json``. One that was damaged or is missing is written only as it was."""
    path = output / "inputs.json"
    lost = f"{path}: is missing or damaged, and the inputs' lengths, times or contents are others now; put it back"
    keep_json(path, inputs, "" if path.exists() else lost)  # read_inputs has set a damaged one aside


def named_places(config: Config) -> Iterator[tuple[str, str, Path]]:
    """Yield (key, name, path) of every file or folder that the configuration names; names on the hub have none."""
    given: list[tuple[str, Any]] = [(key, getattr(config, key)) for key in (*FILES, *MODELS) if key not in MAY_CHANGE]
    given += [(key, name) for key in SEVERAL_MODELS for name in getattr(config, key) if name not in OWN_POLICIES]
    given += [("reward_function", name.rpartition(":")[0]) for name in config.reward_function]
    for key, name in given:
        if name and "{" not in name and (path := find_path(name)):  # a chat template may be given as a text
            yield key, name, path
            base, adapter = base_and_adapter(name) if key in (*MODELS, *SEVERAL_MODELS) else (name, None)
            if adapter and (path := find_path(base)):
                yield key, base, path


def files_at(place: Path) -> list[str]:
    """Return the paths, within ``place``, of the files that are read; "." where it is a file itself."""
    if place.is_file():
        return ["."]
    return sorted(file.name for file in place.iterdir() if file.is_file() and file.suffix in ENDINGS)


def sums_of(files: dict[str, list]) -> dict[str, str]:
    """Return the SHA-256 of each file, of what :func:`fingerprint` returned."""
    return {file: each[-1] for file, each in files.items()}


def fingerprint(file: Path, before: list | None) -> list:
    """Return ``[length, time in ns, SHA-256]`` of a file; the checksum is as ``before`` if length and time are."""
    at = file.stat()
    if before and before[:2] == [at.st_size, at.st_mtime_ns]:
        return before
    return [at.st_size, at.st_mtime_ns, checksum(file)[1]]
