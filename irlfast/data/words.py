r"""Tokenise word by word, where it is proven that the token ids of a word depend on the word alone.

A byte-level BPE tokenizer takes its added tokens out of a text, splits each part between them into words by a pattern,
and encodes each word alone. Texts have few distinct words, so that a table takes a fifth of the library's CPU time.

The library's patterns have classes of Unicode. ``PATTERNS`` has the same patterns with the part of these classes that
is ASCII, and finds the same words in ASCII text. The library must find the same word where it stands alone, which is
checked when the word enters the table. Other text is cut at each space between an ASCII letter or digit and an ASCII
letter: none of the patterns has a word that crosses such a place, or looks across it. What is not ASCII between two
such places is encoded by the library.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

MOST_WORDS = 2**15  # words in the table before it is emptied
LONGEST = 64  # characters of a stretch of other text in the table
CUT = re.compile(r"(?<=[A-Za-z0-9])(?= [A-Za-z])")
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {  # the library's pattern, and its words of ASCII
    GPT_2: r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}


class WordEncoder:
    """Encode texts by a table of words. See :func:`make_word_encoder`."""

    def __init__(self, tokenizer: Any, words: re.Pattern[str], added: Sequence[dict[str, int]]) -> None:
        """``added`` has the ids of the tokens that are taken out of a text first, and of those that come next."""
        self.tokenizer = tokenizer  # of the library ``tokenizers``
        self.words = words
        self.added: dict[str, tuple[int, ...]] = {
            text: (number,) for tokens in added for text, number in tokens.items()
        }
        self.takes = [re.compile(f"({'|'.join(longest_first(tokens))})") for tokens in added if tokens]
        self.has_added = re.compile("|".join(longest_first(self.added)) or r"(?!)").search
        self.table: dict[str, tuple[int, ...]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, as ``encode_batch`` of the library does without special tokens."""
        split = [self.split(text) for text in texts]
        if len(self.table) > MOST_WORDS:
            self.table.clear()
        table, flat = self.table, itertools.chain.from_iterable
        new = {*flat(split)}.difference(table)
        if new:
            found = self.look_up([*new])
            if found is None:
                return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
            table.update(found)
        ids = [list(flat(map(table.__getitem__, pieces))) for pieces in split]
        for piece in new:
            if len(piece) > LONGEST:
                del table[piece]
        return ids

    def split(self, text: str) -> list[str]:
        """Split a text into added tokens, words of ASCII, and stretches of other text."""
        return self.split_at_added(text, 0) if self.has_added(text) else self.split_part(text)

    def split_at_added(self, text: str, stage: int) -> list[str]:
        if stage == len(self.takes):
            return self.split_part(text)
        pieces: list[str] = []
        for place, part in enumerate(self.takes[stage].split(text)):
            pieces += [part] if place % 2 else self.split_at_added(part, stage + 1)
        return pieces

    def split_part(self, text: str) -> list[str]:
        if text.isascii():
            return self.words.findall(text)
        pieces: list[str] = []
        for stretch in CUT.split(text):
            pieces += self.words.findall(stretch) if stretch.isascii() else [stretch]
        return pieces

    def look_up(self, pieces: list[str]) -> dict[str, tuple[int, ...]] | None:
        """Encode pieces by the library; None if a word of ASCII is more than one word to it."""
        found: dict[str, tuple[int, ...]] = {}
        encodings = self.tokenizer.encode_batch(pieces, add_special_tokens=False)
        for piece, encoding in zip(pieces, encodings, strict=True):
            ids = self.added.get(piece)
            if ids is None:
                ids = tuple(encoding.ids)
                if piece.isascii() and any(encoding.word_ids):
                    return None
            found[piece] = ids
        return found


def make_word_encoder(tokenizer: Any, state: dict[str, Any]) -> WordEncoder | None:
    """Make the encoder by words of a tokenizer whose JSON is ``state``; None if its words are not proven to be alone.

    The tokenizer is a ``tokenizers.Tokenizer`` with neither truncation, nor padding, nor a post-processor.
    """
    words = pattern_of(state["pre_tokenizer"])
    tokens = state["added_tokens"]
    takes_more = any(token[flag] for token in tokens for flag in ("single_word", "lstrip", "rstrip"))
    if words is None or state["normalizer"] or takes_more or not is_byte_level(state["model"]):
        return None
    added = [{each["content"]: each["id"] for each in tokens if each["normalized"] is later} for later in (False, True)]
    return WordEncoder(tokenizer, words, added)


def longest_first(tokens: Iterable[str]) -> list[str]:
    return [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]


def pattern_of(splitter: dict[str, Any] | None) -> re.Pattern[str] | None:
    """Return the pattern of ``PATTERNS`` for a pre-tokenizer's JSON; None for a pre-tokenizer without one."""
    parts = (splitter or {}).get("pretokenizers", [splitter or {}])
    last = parts[-1] if parts else {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(parts) == 1 and last["use_regex"]:
        return re.compile(PATTERNS[GPT_2], re.ASCII)
    if len(parts) == 2 and not last["use_regex"] and is_plain_split(parts[0]):
        pattern = PATTERNS.get(parts[0]["pattern"].get("Regex", ""))
        return re.compile(pattern, re.ASCII) if pattern else None
    return None


def is_plain_split(part: dict[str, Any]) -> bool:
    return part.get("type") == "Split" and part["behavior"] == "Isolated" and not part["invert"]


def is_byte_level(model: dict[str, Any]) -> bool:
    """Return whether a model's JSON is BPE with a token for each byte, whose tokens spell their text and no more."""
    from tokenizers import pre_tokenizers

    if model["type"] != "BPE" or model["dropout"]:
        return False
    affixes = model["continuing_subword_prefix"] or model["end_of_word_suffix"]
    return not affixes and {*pre_tokenizers.ByteLevel.alphabet()} <= model["vocab"].keys()
