"""Read the demonstrations of a run's sources one by one, and count the rows that are read and left out."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.counts import SourceCounts, describe_source
from irlfast.data.demonstrations import ParsedRow, to_demonstration
from irlfast.data.messages import replace_surrogates
from irlfast.data.rows import BadRow, Demonstration, LeftOut
from irlfast.data.sources import Source, read_rows

REPLACED = "lone surrogates replaced by U+FFFD"
UNREADABLE = "that cannot be read"
T = TypeVar("T")


def read_demonstrations(
    config: Config,
    sources: Sequence[Source],
    counts: list[SourceCounts],
    *,
    limit: int | None = None,
    prompts_only: bool = False,
) -> Iterator[Demonstration]:
    """Return the first ``limit`` demonstrations of the sources, mixed. Each source adds its counts to ``counts``.

    With ``prompts_only``, rows need no answer; without one, their ``answer`` is None.

    Raises:
        InputError: a row cannot be read, a source or split is missing, or no source has a demonstration. The message
            names the file and the row.
    """
    own = [SourceCounts(display_name(source)) for source in sources]
    counts += own
    streams = [read_source(config, source, count, prompts_only) for source, count in zip(sources, own, strict=True)]
    yield from itertools.islice(mix(streams, [source.weight for source in sources]), limit)
    if not any(count.conventions for count in own):
        raise InputError(
            f"found no {'prompt' if prompts_only else 'demonstration'}; {'. '.join(map(describe_source, own))}"
        )


def display_name(source: Source) -> str:
    return source.name if source.split in (None, "train") else f"{source.name}, split {source.split!r}"


def read_source(config: Config, source: Source, counts: SourceCounts, prompts_only: bool) -> Iterator[Demonstration]:
    """Return the demonstrations of one source, and count all its rows."""
    for where, row in read_rows(config, source, counts):
        counts.rows += 1
        try:
            parsed = parse_row(config, source, where, row, prompts_only)
        except LeftOut as reason:
            counts.leave_out(where, str(reason), str(reason), row)
        except BadRow as error:
            if config.bad_rows == "refuse":
                raise BadRow(f"{where}: {error}") from error
            counts.leave_out(where, UNREADABLE, str(error), None if isinstance(row, BadRow) else row)
        else:
            count_row(parsed, counts)
            yield parsed.demonstration


def parse_row(
    config: Config, source: Source, where: str, row: dict[str, Any] | BadRow, prompts_only: bool
) -> ParsedRow:
    if isinstance(row, BadRow):
        raise row
    try:
        text, replaced = replace_surrogates(row)
        parsed = to_demonstration(text, where, config.learn_turns, source.columns, prompts_only)
    except RecursionError as error:
        raise BadRow("found values nested too deeply, expected messages and texts") from error
    if parsed.convention == "text" and config.facts.has_stages:
        raise InputError(
            f"{where}: found a text without a prompt, which only method sft learns; expected a prompt and an answer, "
            "or the key columns to name them"
        )
    return parsed._replace(notes=parsed.notes + [REPLACED] * replaced) if replaced else parsed


def count_row(parsed: ParsedRow, counts: SourceCounts) -> None:
    counts.conventions[parsed.convention] += 1
    for name, value in parsed.demonstration.row.items():
        if value is not None and name not in parsed.columns:
            counts.ignored[name] += 1
    for note in parsed.notes:
        counts.notes[note] += 1


def mix(streams: Sequence[Iterator[T]], weights: Sequence[float | None]) -> Iterator[T]:
    """Mix the items of several streams.

    Without weights, the streams take turns until all have ended. With weights, each stream has its share at every
    point, to about one item; the mix ends with the first stream that ends.
    """
    if len(streams) == 1:
        yield from streams[0]
        return
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
