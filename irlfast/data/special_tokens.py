"""Tokenise texts so that a special token spelled in a user's text stays text.

The special tokens that a chat template writes must become tokens, and a user who writes ``<|im_end|>`` must not end a
turn. Three steps do this:

1. ``escape_special_tokens`` puts a character that no text has into every such spelling in a user's text.
2. The template renders the conversation. In the result, ``rename`` gives the template's special tokens names that no
   text has, and removes the escapes.
3. A copy of the tokenizer knows its special tokens by these names only.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from irlfast.data.rows import Demonstration
from irlfast.data.templates import ESCAPE
from irlfast.data.words import make_word_encoder

JSON_ESCAPE = "\\ufdd0"  # ESCAPE in a value that a template writes as JSON in ASCII
PRIVATE_NAME = "\ufdd4{}\ufdd5"  # the name of a special token in the copy of the tokenizer


class Encoded(NamedTuple):
    """Token ids of a text, and the characters that each token stands for."""

    ids: list[int]
    characters: int  # of the text after ``rename``
    encoding: Any = None  # the ``tokenizers.Encoding``; None if the ids spell the text, or another tokenizer made them

    def end_of(self, token: int) -> int:
        """Return the character behind a token; 0 without an encoding, where equal ids are equal texts, or unknown."""
        return self.encoding.token_to_chars(token)[1] if self.encoding else 0


class SafeTokenizer(NamedTuple):
    """A tokenizer of rendered texts in which users' special tokens are escaped."""

    special: re.Pattern[str]  # the spellings that only the template may write
    encode: Callable[[Sequence[str]], list[Encoded]]
    spans: Callable[[str], list[tuple[int, int]]]  # the characters of each token of a text; [] if they are not known
    rename: Callable[[str], str]  # gives the text whose characters an :class:`Encoded` counts
    by_words: bool  # see :func:`splits_into_words`


def make_safe_tokenizer(tokenizer: Any, control: Sequence[str]) -> SafeTokenizer:
    """Make a tokenizer for which the tokens in ``control`` are text unless the template writes them.

    Only a tokenizer of the library ``tokenizers`` can be copied. With another tokenizer, special tokens in texts stay
    tokens, and :func:`escape_special_tokens` leaves texts as they are.
    """
    pattern = re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)) or r"(?!)")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return SafeTokenizer(
            re.compile(r"(?!)"),
            lambda texts: encode_slowly(tokenizer, texts),
            lambda text: [],
            lambda text: text,
            by_words=False,
        )
    names = {token: PRIVATE_NAME.format(tokenizer.convert_tokens_to_ids(token)) for token in control}
    copy = copy_with_names(backend, names)
    state = json.loads(copy.to_str())
    words = make_word_encoder(copy, state)

    def rename(text: str) -> str:
        return pattern.sub(lambda match: names[match[0]], text).replace(ESCAPE, "").replace(JSON_ESCAPE, "")

    def encode(texts: Sequence[str]) -> list[Encoded]:
        renamed = [rename(text) for text in texts]
        if words:
            return [Encoded(ids, len(text)) for ids, text in zip(words.encode(renamed), renamed, strict=True)]
        encodings = copy.encode_batch(renamed, add_special_tokens=False)
        return [Encoded(each.ids, len(text), each) for each, text in zip(encodings, renamed, strict=True)]

    def spans(text: str) -> list[tuple[int, int]]:
        return copy.encode(rename(text), add_special_tokens=False).offsets

    return SafeTokenizer(pattern, encode, spans, rename, splits_into_words(state))


def splits_into_words(state: dict[str, Any]) -> bool:
    """Return whether a tokenizer splits a text into words by a pattern, from left to right, and encodes words alone.

    Then a word's tokens depend on nothing before the word. GPT-2's and Llama 3's tokenizers are such. SentencePiece's,
    which put a space before the first word, are not. ``state`` is the tokenizer's own JSON.
    """
    splitter = state["pre_tokenizer"] or {}
    parts = splitter.get("pretokenizers", [splitter])
    known = all(part.get("type") in ("Split", "ByteLevel", "Digits") for part in parts)
    splits = any(part.get("type") == "Split" or part.get("use_regex") for part in parts)
    changes = state["normalizer"] or any(part.get("add_prefix_space") for part in parts)
    return state["model"]["type"] == "BPE" and known and splits and not changes


def escape_special_tokens(row: Demonstration, tokenizer: SafeTokenizer) -> Demonstration:
    """Escape every special token in a demonstration's texts: ``ESCAPE`` goes behind its first character.

    Return the same demonstration if no text spells one.
    """
    if not spells_special(row, tokenizer):
        return row
    parts = ("prompt", "answer", "rejected", "tools")
    return row._replace(**{name: escape(getattr(row, name), tokenizer.special) for name in parts})


def escape(value: Any, special: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return special.sub(lambda match: match[0][0] + ESCAPE + match[0][1:], value)
    if isinstance(value, dict):
        return {key: each if key == "role" else escape(each, special) for key, each in value.items()}
    return [escape(each, special) for each in value] if isinstance(value, list) else value


def spells_special(row: Demonstration, tokenizer: SafeTokenizer) -> bool:
    """Return whether a text of a demonstration spells a special token."""
    spells, left = tokenizer.special.search, [row.prompt, row.answer, row.rejected, row.tools]
    while left:
        value = left.pop()
        if isinstance(value, str):
            if spells(value):
                return True
        elif isinstance(value, dict):
            for key, each in value.items():
                if key != "role":
                    left.append(each)
        elif isinstance(value, list):
            left += value
    return False


def copy_with_names(backend: Any, names: dict[str, str]) -> Any:
    """Copy a ``tokenizers.Tokenizer``, and give the tokens in ``names`` new names."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    elif vocabulary:  # Unigram has pairs of a token and its score
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    state |= {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(state))


def encode_slowly(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    ids = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [Encoded(each, len(text)) for each, text in zip(ids, texts, strict=True)]


def control_tokens(tokenizer: Any, template_text: str) -> list[str]:
    """Return the spellings that users' texts must not write: special tokens, and added tokens in ``template_text``.

    ``template_text`` is the text that the chat template writes around turns. DeepSeek's ``<｜User｜>`` begins a turn,
    though it is not flagged as special. Other added tokens, such as ``<think>``, belong in answers.
    """
    names = {*tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or (token.content in template_text and re.search(r"[<\[|｜]", token.content)):
            names.add(token.content)
    return sorted(name for name in names if name.strip())
