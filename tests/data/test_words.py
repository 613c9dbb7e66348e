"""Tokenising by words gives the library's own token ids, whatever the tokenizer, its added tokens and the text."""

import functools
import itertools
import json
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from irlfast.data import words
from irlfast.data.special_tokens import copy_with_names
from irlfast.data.words import GPT_2, PATTERNS, WordEncoder, make_word_encoder

CLASSES = "aZs09 \t\n\r'.<_\x1c"  # characters that the patterns tell apart, and some that they do not
SAID = [
    "What isn't it? It'S THE   capital, they'll say:\n\n### Response: 1234 days\r\n",
    "naïve café — don’t 我们 說 12.5 % of  the\u00a0cost ١٢٣ 🙂🙂 é\u0301 the cost",
]
PIECES = [
    *CLASSES,
    *SAID[0].split(),
    *SAID[1].split(),
    " the cost",
    "  ",
    "\n\n",
    "’s",
    "ſ",
    "\u2028",
    "\x85",
    "<|end|>",
]
drawn_texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20)


def byte_level(pattern=None, add_prefix_space=False, last=None, **split):
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space, use_regex=pattern is None)
    if pattern is None:
        return last or bytes_of
    parts = pre_tokenizers.Split(Regex(pattern), **{"behavior": "isolated", "invert": False} | split)
    return pre_tokenizers.Sequence([parts, last or bytes_of])


SPLITTERS = {
    "gpt-2": byte_level(),
    **{f"pattern {number}": byte_level(pattern) for number, pattern in enumerate(PATTERNS)},
    "prefix space": byte_level(add_prefix_space=True),
    "prefix space behind a pattern": byte_level([*PATTERNS][1], add_prefix_space=True),
    "another pattern": byte_level(r"\d|\D+?"),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
    "twice": byte_level([*PATTERNS][1], last=byte_level()),
    "inverted": byte_level([*PATTERNS][1], invert=True),
    "merged": byte_level([*PATTERNS][1], behavior="merged_with_previous"),
    "metaspace": pre_tokenizers.Metaspace(),
    "bert": pre_tokenizers.BertPreTokenizer(),
}
BY_WORDS = ["gpt-2", *(f"pattern {number}" for number in range(len(PATTERNS)))]
MODELS = {
    "bpe": (lambda: models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
    "unigram": (models.Unigram, trainers.UnigramTrainer),
    "wordpiece": (lambda: models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
}
ADDED = {
    "none": [],
    "special": [AddedToken("<|end|>", special=True, normalized=False)],
    "overlapping": [AddedToken("<x", normalized=False), AddedToken("<x>", normalized=False), AddedToken("<xx")],
    "in two stages": [AddedToken("  ", normalized=True), AddedToken(" \n", normalized=False), AddedToken("é")],
    "stripping": [AddedToken("<|end|>", lstrip=True, normalized=False)],
    "single word": [AddedToken("the", single_word=True)],
}


@functools.cache
def tokenizer_of(splitter, model="bpe", added="none", normalizer=None):
    make, trainer = MODELS[model]
    tokenizer = Tokenizer(make())
    tokenizer.pre_tokenizer = SPLITTERS[splitter]
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"unk_token": "<unk>"} if model == "unigram" else {}
    tokenizer.train_from_iterator(
        SAID * 4,
        trainer(vocab_size=450, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False, **options),
    )
    tokenizer.add_tokens(ADDED[added])
    return copy_with_names(tokenizer, {})


def encoder_of(*given, **more):
    tokenizer = tokenizer_of(*given, **more)
    return tokenizer, make_word_encoder(tokenizer, json.loads(tokenizer.to_str()))


def of_library(tokenizer, texts):
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize("number", range(len(PATTERNS)))
def test_the_patterns_of_ascii_find_the_librarys_words(number):
    """All texts of two characters, all short texts of characters that the patterns tell apart, and drawn ones."""
    splitter, encoder = SPLITTERS[f"pattern {number}"], encoder_of(f"pattern {number}")[1]
    ascii_characters, draw = [*map(chr, range(128))], random.Random(number)
    texts = [*map("".join, itertools.product(ascii_characters, repeat=2))]
    texts += map("".join, itertools.product(CLASSES, repeat=4))
    texts += ("".join(draw.choices(ascii_characters, k=12)) for _ in range(5000))
    texts += ("".join(draw.choices(CLASSES, k=12)) for _ in range(5000))
    for text in texts:
        found = encoder.words.findall(text)
        assert found == [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
        assert "".join(found) == text


@pytest.mark.parametrize("splitter", BY_WORDS)
@pytest.mark.parametrize("added", ["none", "special", "overlapping", "in two stages"])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(drawn_texts, min_size=1, max_size=5))
def test_a_text_has_the_librarys_tokens(splitter, added, texts):
    tokenizer, encoder = encoder_of(splitter, added=added)
    assert encoder.encode(texts) == of_library(tokenizer, texts)
    joined = ["".join(texts)]
    assert encoder.encode(joined) == of_library(tokenizer, joined)


@pytest.mark.parametrize("number", range(len(PATTERNS)))
def test_each_character_has_the_librarys_tokens_beside_others(number):
    tokenizer, encoder = encoder_of(f"pattern {number}")
    draw, every = (
        random.Random(number),
        [c for c in map(chr, range(sys.maxunicode + 1)) if not "\ud800" <= c <= "\udfff"],
    )
    texts = [f"a{c} b{c}c {c} d 1{c}2 e{c}\n{c}'s f" for c in [*every[:0x600], *draw.sample(every, 5000)]]
    assert encoder.encode(texts) == of_library(tokenizer, texts)


@pytest.mark.parametrize("splitter", [name for name in SPLITTERS if name not in BY_WORDS])
def test_other_splitters_are_left_to_the_library(splitter):
    assert encoder_of(splitter)[1] is None


@pytest.mark.parametrize(
    "given",
    [
        {"model": "unigram"},
        {"model": "wordpiece"},
        {"added": "stripping"},
        {"added": "single word"},
        {"normalizer": normalizers.NFC()},
    ],
)
def test_tokenizers_whose_words_are_not_alone_are_left_to_the_library(given):
    assert encoder_of("gpt-2", **given)[1] is None


def test_models_that_do_not_spell_each_byte_or_that_draw_are_left_to_the_library():
    tokenizer = tokenizer_of("gpt-2")
    state = json.loads(tokenizer.to_str())
    for change in (
        {"dropout": 0.1},
        {"end_of_word_suffix": "</w>"},
        {"continuing_subword_prefix": "##"},
        {"vocab": {}},
    ):
        assert make_word_encoder(tokenizer, state | {"model": state["model"] | change}) is None
    assert make_word_encoder(tokenizer, state | {"pre_tokenizer": None}) is None


def test_the_table_is_emptied_and_keeps_no_long_stretch(monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 20)
    tokenizer, encoder = encoder_of("gpt-2")
    for number in range(50):
        texts = [f"the cost of {number}", "é" * 65, "é" * 64]
        assert encoder.encode(texts) == of_library(tokenizer, texts)
        assert len(encoder.table) <= 25
        assert max(map(len, encoder.table)) <= 64


def test_texts_are_encoded_whole_where_a_pattern_finds_other_words_than_the_library():
    tokenizer = tokenizer_of("gpt-2")
    encoder = WordEncoder(tokenizer, words.re.compile(r"\S+\s*"), [])
    for texts in (["one"], ["a b", "one"], ["one", "the cost of 5"]):
        assert encoder.encode(texts) == of_library(tokenizer, texts)
    assert encoder.table.keys() == {"one"}
    assert GPT_2 in PATTERNS
