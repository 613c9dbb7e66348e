"""Texts to token ids, where the spelling of a special token in a user's text stays text.

The special tokens that a chat template writes must become tokens, and a user who writes ``<|im_end|>`` must not end a
turn. So a user's text is rendered with such spellings broken by a character that no text has. A copy of the tokenizer
knows its special tokens by names that no text has, either. In a rendered text, the template's special tokens are
renamed; then the broken spellings are made whole, and stay text.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from irlfast.data.rows import Demonstration
from irlfast.data.templates import BROKEN

ESCAPED = "\\ufdd0"  # BROKEN, where a template writes a value as JSON in ASCII
PRIVATE = "\ufdd4{}\ufdd5"  # a special token's name in the copy


class Encoded(NamedTuple):
    """Token ids of a text, and the characters that each token stands for."""

    ids: list[int]
    spans: list[tuple[int, int]]  # empty where the tokenizer tells none


class Speller(NamedTuple):
    """``encode`` reads texts in which special tokens that are to stay text are ``broken``."""

    special: re.Pattern[str]  # the spellings that only the template may write
    encode: Callable[[Sequence[str]], list[Encoded]]
    rename: Callable[[str], str]  # the text whose characters an :class:`Encoded` counts


def make_speller(tokenizer: Any, control: Sequence[str]) -> Speller:
    """``control``: the special tokens that a user's text must not write, by their spelling.

    Only a tokenizer of the library ``tokenizers`` can be copied. With another one, special tokens in texts stay tokens,
    and :func:`broken_texts` leaves texts as they are.
    """
    pattern = re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)) or r"(?!)")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Speller(re.compile(r"(?!)"), lambda texts: encode_slowly(tokenizer, texts), lambda text: text)
    names = {token: PRIVATE.format(tokenizer.convert_tokens_to_ids(token)) for token in control}
    copy = renamed(backend, names)

    def rename(text: str) -> str:
        return pattern.sub(lambda found: names[found[0]], text).replace(BROKEN, "").replace(ESCAPED, "")

    def encode(texts: Sequence[str]) -> list[Encoded]:
        found = copy.encode_batch([rename(text) for text in texts], add_special_tokens=False)
        return [Encoded(each.ids, each.offsets) for each in found]

    return Speller(pattern, encode, rename)


def broken_texts(row: Demonstration, speller: Speller) -> Demonstration:
    """A demonstration in whose texts every spelling of a special token is broken behind its first character."""

    def broken(value: Any) -> Any:
        if isinstance(value, str):
            return speller.special.sub(lambda found: found[0][0] + BROKEN + found[0][1:], value)
        if isinstance(value, dict):
            return {key: each if key == "role" else broken(each) for key, each in value.items()}
        return [broken(each) for each in value] if isinstance(value, list) else value

    return row._replace(**{name: broken(getattr(row, name)) for name in ("prompt", "answer", "rejected", "tools")})


def renamed(backend: Any, names: dict[str, str]) -> Any:
    """A copy of a ``tokenizers.Tokenizer`` whose tokens have other ``names``."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    elif vocabulary:  # Unigram's: pairs of a token and its score
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    state |= {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(state))


def encode_slowly(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    return [Encoded(ids, []) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]


def control_tokens(tokenizer: Any, written: str) -> list[str]:
    """The spellings that users' texts must not write: special tokens, and added tokens in ``written``.

    ``written`` is what the chat template writes around turns. DeepSeek's ``<｜User｜>`` begins a turn, though it is not
    flagged as special. Other added tokens, such as ``<think>``, belong into answers.
    """
    names = {*tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or (token.content in written and re.search(r"[<\[|｜]", token.content)):
            names.add(token.content)
    return sorted(name for name in names if name.strip())
