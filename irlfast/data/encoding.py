"""Turn demonstrations into token ids: the one path from text that sampling, scoring and training share.

An example is a prompt and an answer. If the model uses a BOS, exactly one stands at the start of the prompt. Exactly
one end token stands at the end of the answer, unless the answer had to be cut. Together they are the ids of the text
that the chat template writes for the conversation, up to the end token.
"""

import datetime
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.counts import SetCounts
from irlfast.data.hashes import Hashes
from irlfast.data.rows import Demonstration, Message
from irlfast.data.special_tokens import (
    Encoded,
    SafeTokenizer,
    control_tokens,
    escape_special_tokens,
    make_safe_tokenizer,
)
from irlfast.data.templates import (
    RenderedRow,
    Template,
    TemplateRefusal,
    adds_bos,
    choose_template,
    make_template,
    mend_conversation,
    render_row,
    texts_of,
    without_first_turns,
)

BATCH = 1000  # demonstrations that are encoded together
APART = (
    "answers are tokenised apart from their prompts, because a token would straddle both, or because a special token "
    "of the template would take the answer's white space"
)


class Encoder(NamedTuple):
    """How a run writes conversations for its tokenizer. See :func:`make_encoder`."""

    tokenizer: Any
    template: Template
    bos: list[int]  # put before a prompt that has none
    end_id: int  # the token that answers are trained to end with
    ends: tuple[int, ...]  # every token that ends an answer, ``end_id`` among them
    ends_itself: bool  # the template writes the end token; otherwise ``encode`` puts it behind an answer


class Ids(NamedTuple):
    """Token ids of a demonstration."""

    prompt: list[int]
    answer: list[int]
    rejected: list[int]
    earlier: list[int]  # positions in the prompt that hold earlier answers to learn


# ---------------------------------------------------------------- the tokenizer and its template


def make_encoder(
    tokenizer: Any, config: Config, begun: datetime.datetime | None = None, stops: Sequence[int] = ()
) -> Encoder:
    """Make the run's encoder: its chat template, BOS and end tokens.

    Args:
        begun: the time that the template's clock shows; default: now.
        stops: end tokens that the model's own files name.

    Raises:
        InputError: the template cannot write a question with its answer, or there is no end token.
    """
    choose_template(tokenizer, config)
    template = make_template(tokenizer, config, begun or datetime.datetime.now())
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    named = {*stops, tokenizer.eos_token_id} - {None}
    end_id = find_end_token(template, named)
    if end_id is None:
        raise InputError("the tokenizer has no end token; expected an eos_token, so that answers can end")
    writes_end = end_id in tokenizer(template.after, add_special_tokens=False).input_ids
    return Encoder(tokenizer, template, bos, end_id, tuple(sorted({end_id, *named})), writes_end)


def find_end_token(template: Template, stops: set[int]) -> int | None:
    """Find the token that ends an answer: the first special token behind it, or else the tokenizer's EOS.

    If several special tokens stand together, as Command R's ``<|END_RESPONSE|><|END_OF_TURN_TOKEN|>``, the end token
    is the first one in ``stops``, or else the last one.
    """
    tokenizer = template.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(template.after, add_special_tokens=False).input_ids
    from_first_special = itertools.dropwhile(lambda token: token not in special, ids)
    together = list(itertools.takewhile(lambda token: token in special, from_first_special))
    known = [token for token in together if token in stops]
    return [*known[:1], *together[-1:], tokenizer.eos_token_id][0]


# ---------------------------------------------------------------- encoding


def encode(
    rows: Iterable[Demonstration],
    encoder: Encoder,
    config: Config,
    counts: SetCounts,
    kept: Hashes | None = None,
) -> Iterator[tuple[Demonstration, Ids]]:
    """Return every demonstration that is kept, with its token ids. Count duplicates, empty and too long rows.

    ``kept`` has the hashes of the rows that earlier calls kept, for rows that are encoded part by part.

    Raises:
        InputError: the template refuses a row, and ``bad_rows`` is refuse. The message names the row.
    """
    tokenizer = safe_tokenizer(encoder, config)
    kept = Hashes() if kept is None else kept
    stream = iter(rows)
    while batch := list(itertools.islice(stream, BATCH)):
        counts.counts["rows"] += len(batch)
        rendered = [render_or_leave_out(row, encoder, tokenizer, config, counts) for row in batch]
        texts = [pair for pair in rendered if pair]
        keys = [hash((text.prompt, text.answer, text.rejected)) for _, text in texts]
        known, fresh = kept.known(keys), []
        for (row, _), key, ids in zip(texts, keys, encode_texts(texts, encoder, tokenizer, counts), strict=True):
            if row.answer is not None and is_empty(row.answer, ids.answer):
                counts.leave_out(row.where, "empty_answers", row.row)
                continue
            if key in known:
                counts.leave_out(row.where, "duplicates", row.row)
                continue
            fitted = cut_to_length(row, ids, encoder, tokenizer, config, counts)
            if fitted:
                known.add(key)
                fresh.append(key)
                counts.counts["kept"] += 1
                counts.counts["prompt_tokens"] += len(fitted.prompt)
                counts.counts["answer_tokens"] += len(fitted.answer)
                yield row, fitted
        kept.add(fresh)


def safe_tokenizer(encoder: Encoder, config: Config) -> SafeTokenizer:
    """Return the tokenizer of rendered texts; with ``split_special_tokens``, tokens that users spell are text to it."""
    template_text = encoder.template.header + encoder.template.after
    control = control_tokens(encoder.tokenizer, template_text) if config.split_special_tokens else []
    return make_safe_tokenizer(encoder.tokenizer, control)


def is_empty(answer: Message, ids: list[int]) -> bool:
    """Return whether only the end token would be learned: no text in the answer, or none that the template writes."""
    if len(ids) < 2:
        return True
    content = answer.get("content")
    if isinstance(content, str) and content.strip():
        return False
    texts = (text for key, value in answer.items() if key != "role" for text in texts_of(value))
    return not any(text.strip() for text in texts)


def render_or_leave_out(
    row: Demonstration, encoder: Encoder, tokenizer: SafeTokenizer, config: Config, counts: SetCounts
) -> tuple[Demonstration, RenderedRow] | None:
    """Return a row with its text, or None if the template refuses the row and ``bad_rows`` leaves it out."""
    if not row.prompt:  # a text without turns, which no template wraps
        return row, RenderedRow("", row.answer["content"] if row.answer else "", None, [])
    safe = escape_special_tokens(row, tokenizer)
    counts.remarks["rows spell special tokens, which stay text (split_special_tokens)"] += safe is not row
    attempts = [safe]
    if config.bad_rows == "mend":
        attempts.append(safe._replace(prompt=mend_conversation(safe.prompt)))
    refusal = None
    for attempt in attempts:
        try:
            text = render_row(encoder.template, attempt, counts.remarks, config.learn_turns == "all")
        except TemplateRefusal as error:
            refusal = refusal or error
        else:
            counts.remarks["rows that the chat template refuses are mended"] += refusal is not None
            return attempt, text
    if config.bad_rows == "refuse":
        raise InputError(
            f"{row.where}: the chat template refuses the row ({refusal}); expected a conversation that it writes, or "
            "bad_rows: skip, which leaves such rows out, or bad_rows: mend, which moves system texts into the user's "
            "turn and joins turns of one role"
        ) from refusal
    counts.leave_out(row.where, "rows_that_the_chat_template_refuses", row.row)
    return None


def encode_texts(
    rows: Sequence[tuple[Demonstration, RenderedRow]], encoder: Encoder, tokenizer: SafeTokenizer, counts: SetCounts
) -> list[Ids]:
    """Tokenise prompts and answers, end tokens included.

    A prompt and its answer are tokenised together, so that the answer begins as in running text: SentencePiece writes
    the first word of a text in another way. Sampling starts behind the prompt alone, so the prompt must have the same
    ids with and without its answer. If a token straddles the two, or a special token of the prompt takes the answer's
    white space, the answer is tokenised apart.
    """
    texts = [text for _, text in rows]
    prompts = tokenizer.encode([text.prompt for text in texts])
    answers = encode_answers([(text.prompt, text.answer) for text in texts], prompts, encoder, tokenizer, counts)
    with_rejected = [i for i, text in enumerate(texts) if text.rejected is not None]
    pairs = [(texts[i].prompt, str(texts[i].rejected)) for i in with_rejected]
    others = encode_answers(pairs, [prompts[i] for i in with_rejected], encoder, tokenizer, counts)
    rejected = dict(zip(with_rejected, others, strict=True))
    encoded = []
    for i, ((row, text), prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
        if not row.prompt:
            encoded.append(encode_plain_text(text.answer, encoder))
            continue
        bos = encoder.bos if prompt.ids[:1] != encoder.bos else []
        earlier = earlier_answer_positions(text, prompt.ids, encoder, tokenizer, len(bos)) if text.earlier else []
        encoded.append(
            Ids([*bos, *prompt.ids] if bos else prompt.ids, answer if row.answer else [], rejected.get(i, []), earlier)
        )
    return encoded


def encode_answers(
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[Encoded],
    encoder: Encoder,
    tokenizer: SafeTokenizer,
    counts: SetCounts,
) -> list[list[int]]:
    """Tokenise the answers of (prompt, answer) texts, with their end tokens."""
    if not encoder.ends_itself:
        pairs = [(prompt, answer.removesuffix(encoder.template.after)) for prompt, answer in pairs]
    texts, befores = last_lines([prompt for prompt, _ in pairs], prompts, tokenizer)
    wholes = tokenizer.encode([text + answer for text, (_, answer) in zip(texts, pairs, strict=True)])
    answers: list[list[int]] = []
    apart: list[int] = []  # the places of answers that must be tokenised apart
    for place, (whole, before) in enumerate(zip(wholes, befores, strict=True)):
        answers.append(whole.ids[len(before.ids) :])
        if not begins_with_prompt(whole, before):
            apart.append(place)
    for place, encoded in zip(apart, tokenizer.encode([pairs[place][1] for place in apart]), strict=True):
        answers[place] = encoded.ids
    counts.counts["tokenised_apart"] += len(apart)
    if not encoder.template.plain:  # prompt_template says where the answer begins, so there is no loss to remark on
        counts.remarks[APART] += len(apart)
    return [cut_at_end_token(ids, encoder, counts) for ids in answers]


def last_lines(
    prompts: Sequence[str], encoded: Sequence[Encoded], tokenizer: SafeTokenizer
) -> tuple[list[str], list[Encoded]]:
    """Return the last line of each prompt, and its tokens, where the tokenizer begins anew at this line.

    An answer has the same tokens behind this line as behind the whole prompt, in less time. Elsewhere the whole prompt
    stays.
    """
    texts, kept = [*prompts], [*encoded]
    if tokenizer.by_words:
        lines = [prompt[prompt.rfind("\n", 0, len(prompt.rstrip())) + 1 :] for prompt in prompts]
        distinct = [*{*lines}]
        tokens = dict(zip(distinct, tokenizer.encode(distinct), strict=True))
        for place, line in enumerate(lines):
            ids = tokens[line].ids
            if line and ids == encoded[place].ids[-len(ids) :]:
                texts[place], kept[place] = line, tokens[line]
    return texts, kept


def begins_with_prompt(whole: Encoded, prompt: Encoded) -> bool:
    """Return whether the prompt's ids are the first of the whole text's ids, and stand for the prompt alone."""
    count = len(prompt.ids)
    return whole.ids[:count] == prompt.ids and (not count or whole.end_of(count - 1) <= prompt.characters)


def cut_at_end_token(ids: list[int], encoder: Encoder, counts: SetCounts) -> list[int]:
    """Cut an answer behind its first end token, where sampling would stop; an answer without one gets ``end_id``."""
    count = sum(map(ids.count, encoder.ends))
    counts.counts["cut_at_end_token"] += count > 1
    if not count:
        return [*ids, encoder.end_id]
    if count == 1 and ids[-1] in encoder.ends:
        return ids
    return ids[: next(at for at, token in enumerate(ids) if token in encoder.ends) + 1]


def encode_plain_text(text: str, encoder: Encoder) -> Ids:
    """Tokenise a text without turns, whose special tokens stay tokens: from the BOS or its first token, to the EOS."""
    tokenizer = encoder.tokenizer
    ids = [*encoder.bos, *tokenizer(text, add_special_tokens=False).input_ids]
    ids = ids[1:] if ids[1:2] == encoder.bos else ids
    end = encoder.end_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return Ids(ids[:1], ids[1:] if ids[-1:] == [end] else [*ids[1:], end], [], [])


def earlier_answer_positions(
    text: RenderedRow, prompt: list[int], encoder: Encoder, tokenizer: SafeTokenizer, before: int
) -> list[int]:
    """Return the positions of earlier answers, each with its end token; ``before`` tokens precede the prompt's."""
    positions: list[int] = []
    special = {*encoder.tokenizer.all_special_ids, *encoder.tokenizer.added_tokens_decoder}
    renamed, spans = tokenizer.rename(text.prompt), tokenizer.spans(text.prompt)
    for start, end in text.earlier:
        first, behind = len(tokenizer.rename(text.prompt[:start])), len(tokenizer.rename(text.prompt[:end]))
        inside = []
        for at, (begin, stop) in enumerate(spans):
            if first < stop <= behind and not renamed[begin:first].strip():  # a word may have the space before it
                inside.append(at)
        positions += inside
        follows = inside[-1] + 1 if inside else len(prompt)
        if follows < len(prompt) and prompt[follows] in special:
            positions.append(follows)
    return [before + at for at in positions]


# ---------------------------------------------------------------- lengths


def cut_to_length(
    row: Demonstration, ids: Ids, encoder: Encoder, tokenizer: SafeTokenizer, config: Config, counts: SetCounts
) -> Ids | None:
    """Cut a demonstration to ``max_prompt_length`` and ``max_length``, or return None to leave it out.

    A long prompt loses its first turns, but never its system text, and then the beginning of its last turn. A long
    answer loses its end. With ``overlong: drop``, a row that is too long is left out.
    """
    if not ids.prompt and config.bad_rows == "refuse":
        raise InputError(f"{row.where}: the prompt has no token, and the tokenizer no BOS; expected a text")
    if not ids.prompt:
        counts.leave_out(row.where, "prompts_without_a_token", row.row)
        return None
    long_prompt = len(ids.prompt) > config.max_prompt_length
    if long_prompt and config.overlong == "cut":
        shortened = shorten_prompt(row, encoder, tokenizer, config)
        if shortened is None:
            counts.leave_out(row.where, "too_long", row.row)
            return None
        counts.counts["cut_prompts"] += 1
        ids = shortened
    room = config.max_length - len(ids.prompt)
    long_answer = len(ids.answer) > room
    if config.overlong == "drop" and (long_prompt or long_answer):
        counts.leave_out(row.where, "too_long", row.row)
        return None
    counts.counts["cut_answers"] += long_answer
    is_long = long_answer or len(ids.rejected) > room
    return ids._replace(answer=ids.answer[:room], rejected=ids.rejected[:room]) if is_long else ids


def shorten_prompt(row: Demonstration, encoder: Encoder, tokenizer: SafeTokenizer, config: Config) -> Ids | None:
    """Return the ids with as much of the prompt's end as fits, or None if nothing of the prompt fits."""

    def encode_if_it_fits(prompt: list[Message]) -> Ids | None:
        shortened = row._replace(prompt=prompt)
        try:
            text = render_row(encoder.template, shortened, Counter(), config.learn_turns == "all")
        except TemplateRefusal:
            return None
        ids = encode_texts([(shortened, text)], encoder, tokenizer, SetCounts())[0]
        return ids if len(ids.prompt) <= config.max_prompt_length else None

    later = without_first_turns(row.prompt)
    for prompt in later:
        ids = encode_if_it_fits(prompt)
        if ids:
            return ids
    shortest = later[-1] if later else row.prompt
    at = next((at for at, message in enumerate(shortest) if message["role"] not in ("system", "developer")), None)
    text = None if at is None else shortest[at].get("content")
    if at is None or not isinstance(text, str):
        return None
    low, high, best = 1, len(text), None  # binary search for the number of characters that the turn loses
    while low <= high:
        middle = (low + high) // 2
        turn = shortest[at] | {"content": text[middle:]}
        ids = encode_if_it_fits([*shortest[:at], turn, *shortest[at + 1 :]])
        low, high, best = (low, middle - 1, ids) if ids else (middle + 1, high, best)
    return best
