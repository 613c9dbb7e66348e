"""Figures of answers as texts: likeness to the expert's, repetition, diversity, and the scores of a user's function.

A word is a run of letters and digits. In scripts that write no spaces, such as Chinese, each character is a word. Other
characters, such as punctuation, are units of their own, which ROUGE-L does not read.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import regex
from rapidfuzz.distance import Indel, Levenshtein
from sacrebleu.metrics import BLEU

from irlfast.common.files import InputError
from irlfast.data.diversity import distinct
from irlfast.evaluation.figures import FIGURES
from irlfast.sampling.reward_function import describe, load_function, to_number

# Scripts without spaces between words; their characters, with the marks on them, are words.
SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
WORD = regex.compile(rf"[{SPACELESS}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{SPACELESS}]]+", regex.V1)
UNIT = regex.compile(rf"{WORD.pattern}|\S", regex.V1)
NGRAM = 4  # of the repetition (Welleck et al. 2020, arXiv 1908.04319)
SELF_BLEU = BLEU(tokenize="none", effective_order=True)  # texts may have fewer than four words


def text_figures(answer: str, expert: str | None) -> dict[str, float]:
    """Return the figures of an answer; those that compare it are absent without an ``expert``'s answer.

    - ``exact_match``: 1 if both texts are equal, but for white space around them.
    - ``rouge_l``: the F-measure of the longest common subsequence of words, without case (Lin 2004). It equals that of
      the package rouge-score, whose own words are those of ASCII alone.
    - ``edit_distance``: characters to insert, delete or replace; ``edit_similarity``: 1 less the distance per character
      of the longer text.
    - ``repetition``: the share of 4-grams of words and punctuation that the answer has had before.
    """
    figures = {"repetition": repetition(units(answer))}
    if expert is None:
        return figures
    answer, expert = answer.strip(), expert.strip()
    return figures | {
        "exact_match": float(answer == expert),
        "rouge_l": Indel.normalized_similarity(words(answer), words(expert)),  # 2·LCS / (words of both)
        "edit_distance": float(Levenshtein.distance(answer, expert)),
        "edit_similarity": Levenshtein.normalized_similarity(answer, expert),
    }


def diversity_figures(samples: Sequence[str]) -> dict[str, float]:
    """Return how different the samples of one prompt are; a figure is absent where there is nothing to compare.

    - ``distinct_1``, ``distinct_2``: different words and 2-grams per word and 2-gram (arXiv 1510.03055).
    - ``self_bleu``: the mean BLEU of each sample against the others, from 0 to 1 (arXiv 1802.01886).
    """
    texts = [units(sample) for sample in samples]
    figures = {f"distinct_{n}": distinct(texts, n) for n in (1, 2) if any(len(text) >= n for text in texts)}
    written = [" ".join(text) for text in texts if text]
    if len(written) > 1:
        scores = [
            SELF_BLEU.sentence_score(text, written[:i] + written[i + 1 :]).score for i, text in enumerate(written)
        ]
        figures["self_bleu"] = sum(scores) / len(scores) / 100
    return figures


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def units(text: str) -> list[str]:
    """Return the words and the other characters of a text, without white space."""
    return UNIT.findall(text)


def repetition(text: Sequence[str]) -> float:
    return 1 - distinct([text], NGRAM) if len(text) >= NGRAM else 0.0


# ---------------------------------------------------------------- a user's function

Scorer = Callable[[str, str, str | None, dict[str, Any]], dict[str, float]]


def load_scorer(name: str) -> Scorer:
    """Return ``package.module:function`` or ``file.py:function`` as a function from an answer to its figures.

    The user's function gets the prompt's text, the answer, the expert's answer or None, and the row as it was read. It
    returns a number, whose figure has the function's name, or a dictionary of numbers by name. None is no number.

    Raises:
        InputError: the function cannot be imported.
        InputError: on a call, the function fails, or it returns something else or a figure that exists already.
    """
    function = load_function(name, "scorer")
    own_name = name.rpartition(":")[2]

    def score(prompt: str, answer: str, expert: str | None, row: dict[str, Any]) -> dict[str, float]:
        try:
            returned = function(prompt, answer, expert, row)
        except Exception as error:  # the user's function may raise anything
            raise InputError(f"scorer {name}: it failed ({describe(error)})") from error
        scores = returned if isinstance(returned, dict) else {own_name: returned}
        if taken := FIGURES.keys() & scores.keys():
            raise InputError(f"scorer {name}: found a score {min(taken)!r}, which is another figure's name")
        figures = {str(each): to_number(value, f"scorer {name}", answer) for each, value in scores.items()}
        return {each: value for each, value in figures.items() if not math.isnan(value)}

    return score
