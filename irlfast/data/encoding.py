"""Demonstrations to token ids: the one path from text that sampling, scoring and training share.

An example is prompt and answer: exactly one BOS at the start of the prompt if the model uses one, exactly one end token
at the end of the answer unless the answer had to be cut. Prompt and answer together are the ids of what the chat
template writes for the conversation, up to the end token.
"""

import datetime
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.rows import Demonstration, Message
from irlfast.data.spelling import Encoded, Speller, broken_texts, control_tokens, make_speller
from irlfast.data.templates import (
    Refused,
    Template,
    Written,
    adds_bos,
    choose_template,
    make_template,
    mended,
    shorter,
    texts_of,
    write,
)

BATCH = 1000  # demonstrations that are encoded together
COUNTED = ("rows", "kept", "empty_answers", "duplicates", "cut_prompts", "cut_answers", "cut_at_end_token", "too_long")
APART = (
    "answers are tokenised apart from their prompts, as a token would straddle both, or a special token of the "
    "template take the answer's white space"
)
EXAMPLES = 100  # rows left out that are shown in data/dropped.jsonl


class Encoder(NamedTuple):
    """How a run writes conversations for its tokenizer. See :func:`make_encoder`."""

    tokenizer: Any
    template: Template
    bos: list[int]  # put before a prompt that has none
    end_id: int  # the token that answers are trained to end with
    ends: tuple[int, ...]  # every token that ends an answer, end_id among them
    ends_itself: bool  # the template writes the end token; else it is put behind an answer


@dataclass
class Tally:
    """Counts of what became of the rows of a set."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    remarks: Counter[str] = field(default_factory=Counter)  # how often what the sentence says holds
    dropped: list[dict[str, Any]] = field(default_factory=list)  # the first rows that were left out


class Ids(NamedTuple):
    """Token ids of a demonstration."""

    prompt: list[int]
    answer: list[int]
    rejected: list[int]
    earlier: list[int]  # positions in the prompt


# ---------------------------------------------------------------- what the tokenizer and its template are


def make_encoder(
    tokenizer: Any, config: Config, begun: datetime.datetime | None = None, stops: Sequence[int] = ()
) -> Encoder:
    """The run's format: its chat template, BOS and end tokens. ``stops``: end tokens that the model's own files name.

    Raises:
        InputError: the template cannot write a question with its answer, or there is no end token.
    """
    choose_template(tokenizer, config)
    template = make_template(tokenizer, config, begun or datetime.datetime.now())
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    named = {*stops, tokenizer.eos_token_id} - {None}
    end_id = template_end(template, named)
    if end_id is None:
        raise InputError("the tokenizer has no end token; expected an eos_token, so that answers can end")
    writes_end = end_id in tokenizer(template.after, add_special_tokens=False).input_ids
    return Encoder(tokenizer, template, bos, end_id, tuple(sorted({end_id, *named})), writes_end)


def template_end(template: Template, stops: set[int]) -> int | None:
    """The token that ends an answer in the template: the first special token after it, else the tokenizer's EOS.

    Where several stand together (Command R: ``<|END_RESPONSE|><|END_OF_TURN_TOKEN|>``), one of ``stops``, or the last.
    """
    tokenizer = template.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(template.after, add_special_tokens=False).input_ids
    behind = itertools.dropwhile(lambda token: token not in special, ids)
    together = list(itertools.takewhile(lambda token: token in special, behind))
    known = [token for token in together if token in stops]
    return [*known[:1], *together[-1:], tokenizer.eos_token_id][0]


# ---------------------------------------------------------------- encoding


def encode(
    rows: Iterable[Demonstration], encoder: Encoder, config: Config, tally: Tally
) -> Iterator[tuple[Demonstration, Ids]]:
    """Every demonstration that is kept, with its token ids. Duplicates, empty and too long ones are counted.

    Raises:
        InputError: naming the row that the template refuses, where ``bad_rows`` is refuse.
    """
    written = encoder.template.header + encoder.template.after
    control = control_tokens(encoder.tokenizer, written) if config.split_special_tokens else []
    speller, seen = make_speller(encoder.tokenizer, control), set[int]()
    stream = iter(rows)
    while batch := list(itertools.islice(stream, BATCH)):
        tally.counts["rows"] += len(batch)
        texts = [pair for row in batch if (pair := written_row(row, encoder, speller, config, tally))]
        for (row, text), ids in zip(texts, encode_texts(texts, encoder, speller, tally), strict=True):
            same = hash((text.prompt, text.answer, text.rejected))
            if row.answer is not None and is_empty(row.answer, ids.answer):
                leave_out(tally, "empty_answers", row)
            elif same in seen:
                leave_out(tally, "duplicates", row)
            elif fitting := fitted(row, ids, encoder, speller, config, tally):
                seen.add(same)
                tally.counts["kept"] += 1
                tally.counts["prompt_tokens"] += len(fitting.prompt)
                tally.counts["answer_tokens"] += len(fitting.answer)
                yield row, fitting


def is_empty(answer: Message, ids: list[int]) -> bool:
    """Whether an answer has no text, or the template writes none of it: only the end token would be learned."""
    return len(ids) < 2 or not any(text.strip() for text in texts_of({**answer, "role": []}))


def leave_out(tally: Tally, reason: str, row: Demonstration) -> None:
    """Count a row that is left out, and keep the first of these rows to be shown."""
    tally.counts[reason] += 1
    if len(tally.dropped) < EXAMPLES:
        tally.dropped.append({"where": row.where, "reason": reason, "row": row.row})


def written_row(
    row: Demonstration, encoder: Encoder, speller: Speller, config: Config, tally: Tally
) -> tuple[Demonstration, Written] | None:
    """A row with its text; None where the template refuses the row and ``bad_rows`` leaves such rows out."""
    if not row.prompt:  # a text without turns, which is the model's own
        return row, Written("", row.answer["content"] if row.answer else "", None, [])
    safe = broken_texts(row, speller)
    tally.remarks["rows spell special tokens, which stay text (split_special_tokens)"] += safe != row
    refusal = None
    for attempt in [safe, safe._replace(prompt=mended(safe.prompt))] if config.bad_rows == "mend" else [safe]:
        try:
            text = write(encoder.template, attempt, tally.remarks, config.learn_turns == "all")
        except Refused as error:
            refusal = refusal or error
        else:
            tally.remarks["rows that the chat template refuses are mended"] += refusal is not None
            return attempt, text
    if config.bad_rows == "refuse":
        raise InputError(
            f"{row.where}: the chat template refuses the row ({refusal}); expected a conversation that it writes, or "
            "bad_rows: skip, which leaves such rows out, or bad_rows: mend, which moves system texts into the user's "
            "turn and joins turns of one role"
        ) from refusal
    leave_out(tally, "rows_that_the_chat_template_refuses", row)
    return None


def encode_texts(
    rows: Sequence[tuple[Demonstration, Written]], encoder: Encoder, speller: Speller, tally: Tally
) -> list[Ids]:
    """Token ids of prompts and answers, end tokens included.

    Prompt and answer are encoded together, so that an answer begins as it does in running text (SentencePiece writes a
    word at the start of a text otherwise). Sampling must start where the answer does, so the prompt must have the same
    ids without its answer. Where a token straddles the two, or a special token of the prompt takes the answer's white
    space, the answer is encoded apart.
    """
    texts = [text for _, text in rows]
    prompts = speller.encode([text.prompt for text in texts])
    answers = encode_answers([(text.prompt, text.answer) for text in texts], prompts, encoder, speller, tally)
    with_rejected = [i for i, text in enumerate(texts) if text.rejected is not None]
    pairs = [(texts[i].prompt, str(texts[i].rejected)) for i in with_rejected]
    others = encode_answers(pairs, [prompts[i] for i in with_rejected], encoder, speller, tally)
    rejected = dict(zip(with_rejected, others, strict=True))
    found = []
    for i, ((row, text), prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
        if not row.prompt:
            found.append(text_ids(text.answer, encoder))
            continue
        shift = encoder.bos if prompt.ids[:1] != encoder.bos else []
        earlier = [len(shift) + at for at in positions(text, prompt, encoder, speller)]
        found.append(Ids([*shift, *prompt.ids], answer if row.answer else [], rejected.get(i, []), earlier))
    return found


def encode_answers(
    pairs: Sequence[tuple[str, str]], prompts: Sequence[Encoded], encoder: Encoder, speller: Speller, tally: Tally
) -> list[list[int]]:
    """Token ids of answers to prompts, with their end tokens."""
    pairs = [
        (prompt, answer if encoder.ends_itself else answer.removesuffix(encoder.template.after))
        for prompt, answer in pairs
    ]
    wholes = speller.encode([prompt + answer for prompt, answer in pairs])
    joined = [
        continues(whole, prompt, len(speller.rename(text)))
        for whole, prompt, (text, _) in zip(wholes, prompts, pairs, strict=True)
    ]
    apart = iter(speller.encode([answer for (_, answer), fits in zip(pairs, joined, strict=True) if not fits]))
    tally.counts["tokenised_apart"] += joined.count(False)
    if encoder.template.own:  # prompt_template says where the answer begins, so that this loses nothing
        tally.remarks[APART] += joined.count(False)
    found = [
        whole.ids[len(prompt.ids) :] if fits else next(apart).ids
        for whole, prompt, fits in zip(wholes, prompts, joined, strict=True)
    ]
    return [ended(ids, encoder, tally) for ids in found]


def continues(whole: Encoded, prompt: Encoded, characters: int) -> bool:
    """Whether the prompt's ids are the first of the whole's, and stand for the prompt's ``characters`` alone."""
    count = len(prompt.ids)
    eaten = bool(count and whole.spans) and whole.spans[count - 1][1] > characters
    return whole.ids[:count] == prompt.ids and not eaten


def ended(ids: list[int], encoder: Encoder, tally: Tally) -> list[int]:
    """An answer up to its first end token, where sampling would stop; one that has none gets the template's."""
    ends = [at for at, token in enumerate(ids) if token in encoder.ends]
    tally.counts["cut_at_end_token"] += len(ends) > 1
    return ids[: ends[0] + 1] if ends else [*ids, encoder.end_id]


def text_ids(text: str, encoder: Encoder) -> Ids:
    """A text of the model's own, special tokens and all: from the BOS, or else its first token, to the EOS."""
    tokenizer = encoder.tokenizer
    ids = [*encoder.bos, *tokenizer(text, add_special_tokens=False).input_ids]
    ids = ids[1:] if ids[1:2] == encoder.bos else ids
    end = encoder.end_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return Ids(ids[:1], ids[1:] if ids[-1:] == [end] else [*ids[1:], end], [], [])


def positions(text: Written, prompt: Encoded, encoder: Encoder, speller: Speller) -> list[int]:
    """Positions of the prompt's tokens that are earlier answers, each with its end token."""
    found: list[int] = []
    if not text.turns:
        return found
    special = {*encoder.tokenizer.all_special_ids, *encoder.tokenizer.added_tokens_decoder}
    for start, end in text.turns:
        first, behind = len(speller.rename(text.prompt[:start])), len(speller.rename(text.prompt[:end]))
        renamed = speller.rename(text.prompt)
        inside = [
            at
            for at, (begin, stop) in enumerate(prompt.spans)
            if first < stop <= behind and not renamed[begin:first].strip()  # a word may have the space before it
        ]
        found += inside
        follows = inside[-1] + 1 if inside else len(prompt.ids)
        if follows < len(prompt.ids) and prompt.ids[follows] in special:
            found.append(follows)
    return found


# ---------------------------------------------------------------- lengths


def fitted(
    row: Demonstration, ids: Ids, encoder: Encoder, speller: Speller, config: Config, tally: Tally
) -> Ids | None:
    """A demonstration within ``max_prompt_length`` and ``max_length``; None where it is left out.

    A long prompt loses its first turns, but never its system text, and then the beginning of its last turn. A long
    answer loses its end. With ``overlong: drop``, either is left out.
    """
    if not ids.prompt and config.bad_rows == "refuse":
        raise InputError(f"{row.where}: the prompt has no token, and the tokenizer no BOS; expected a text")
    if not ids.prompt:
        leave_out(tally, "prompts_without_a_token", row)
        return None
    long_prompt = len(ids.prompt) > config.max_prompt_length
    if long_prompt and config.overlong == "cut":
        cut = shortened(row, encoder, speller, config)
        if cut is None:
            leave_out(tally, "too_long", row)
            return None
        tally.counts["cut_prompts"] += 1
        ids = cut
    room = config.max_length - len(ids.prompt)
    long_answer = len(ids.answer) > room
    if config.overlong == "drop" and (long_prompt or long_answer):
        leave_out(tally, "too_long", row)
        return None
    tally.counts["cut_answers"] += long_answer
    return ids._replace(answer=ids.answer[:room], rejected=ids.rejected[:room])


def shortened(row: Demonstration, encoder: Encoder, speller: Speller, config: Config) -> Ids | None:
    """The demonstration's ids with as much of its prompt as fits, from the end; None where nothing of it does."""

    def attempt(prompt: list[Message]) -> Ids | None:
        cut = row._replace(prompt=prompt)
        try:
            text = write(encoder.template, cut, Counter(), config.learn_turns == "all")
        except Refused:
            return None
        ids = encode_texts([(cut, text)], encoder, speller, Tally())[0]
        return ids if len(ids.prompt) <= config.max_prompt_length else None

    later = shorter(row.prompt)
    for prompt in later:
        if found := attempt(prompt):
            return found
    shortest = later[-1] if later else row.prompt
    at = next((at for at, message in enumerate(shortest) if message["role"] not in ("system", "developer")), None)
    text = None if at is None else shortest[at].get("content")
    if at is None or not isinstance(text, str):
        return None
    low, high, best = 1, len(text), None  # characters that the turn loses
    while low <= high:
        middle = (low + high) // 2
        found = attempt([*shortest[:at], shortest[at] | {"content": text[middle:]}, *shortest[at + 1 :]])
        low, high, best = (low, middle - 1, found) if found else (middle + 1, high, best)
    return best
