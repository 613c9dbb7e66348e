"""Demonstrations of a run's sources, one by one, with an account of what was read and left out."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.demonstrations import Found, to_demonstration
from irlfast.data.messages import mended
from irlfast.data.reading import Reading, describe
from irlfast.data.rows import BadRow, Demonstration, LeftOut
from irlfast.data.sources import Source, read_rows

MENDED = "lone surrogates replaced by U+FFFD"
UNREADABLE = "that cannot be read"
T = TypeVar("T")


def read_demonstrations(
    config: Config,
    sources: Sequence[Source],
    readings: list[Reading],
    *,
    limit: int | None = None,
    prompts_only: bool = False,
) -> Iterator[Demonstration]:
    """The first ``limit`` demonstrations of the sources, mixed; each source adds a Reading to ``readings``.

    With ``prompts_only`` rows without an answer are fine, and their ``answer`` is None.

    Raises:
        InputError: naming the file and the place of a row that cannot be read, a source that is not there, a split
            that it does not have, or sources without a demonstration.
    """
    own = [Reading(named(source)) for source in sources]
    readings += own
    streams = [
        demonstrations_of(config, source, reading, prompts_only) for source, reading in zip(sources, own, strict=True)
    ]
    yield from itertools.islice(mixed(streams, [source.weight for source in sources]), limit)
    if not any(reading.conventions for reading in own):
        raise InputError(f"found no {'prompt' if prompts_only else 'demonstration'}; {'. '.join(map(describe, own))}")


def named(source: Source) -> str:
    return source.name if source.split in (None, "train") else f"{source.name}, split {source.split!r}"


def demonstrations_of(config: Config, source: Source, reading: Reading, prompts_only: bool) -> Iterator[Demonstration]:
    """The demonstrations of one source, with counts of the rest."""
    for where, row in read_rows(config, source, reading):
        reading.rows += 1
        try:
            found = found_in(config, source, where, row, prompts_only)
        except LeftOut as reason:
            reading.leave_out(where, str(reason), str(reason), row)
        except BadRow as error:
            if config.bad_rows == "refuse":
                raise BadRow(f"{where}: {error}") from error
            reading.leave_out(where, UNREADABLE, str(error), None if isinstance(row, BadRow) else row)
        else:
            count(found, reading)
            yield found.demonstration


def found_in(config: Config, source: Source, where: str, row: dict[str, Any] | BadRow, prompts_only: bool) -> Found:
    if isinstance(row, BadRow):
        raise row
    try:
        text, replaced = mended(row)
        found = to_demonstration(text, where, config.learn_turns, source.columns, prompts_only)
    except RecursionError as error:
        raise BadRow("found values nested too deeply, expected messages and texts") from error
    if found.convention == "text" and config.facts.has_stages:
        raise InputError(
            f"{where}: found a text without a prompt, which only method sft learns; expected a prompt and an answer, "
            "or the key columns to name them"
        )
    return found._replace(notes=found.notes + [MENDED] * replaced)


def count(found: Found, reading: Reading) -> None:
    reading.conventions[found.convention] += 1
    row = found.demonstration.row
    reading.ignored.update(name for name, value in row.items() if value is not None and name not in found.columns)
    reading.notes.update(found.notes)


def mixed(streams: Sequence[Iterator[T]], weights: Sequence[float | None]) -> Iterator[T]:
    """Items of several streams. Without weights the streams take turns until all are at their end.

    With weights each stream has its share at every point, but for an item or so; the first at its end ends the mix.
    """
    left = {*range(len(streams))}
    taken = [0] * len(streams)
    while left:
        number = min(left, key=lambda one: ((taken[one] + 0.5) / (weights[one] or 1), one))
        try:
            item = next(streams[number])
        except StopIteration:
            if weights[number]:
                return
            left.remove(number)
        else:
            taken[number] += 1
            yield item
