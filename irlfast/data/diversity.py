"""Describe the answers of a dataset: how long they are, and how much they differ from each other."""

from collections.abc import Sequence

NGRAMS = (1, 2, 3)


def describe_answers(answers: Sequence[str]) -> str:
    """Return one line: ``34.1 words per answer, distinct words 0.08, 2-grams 0.41, 3-grams 0.72``.

    Shares fall with the number of answers: compare only sets of the same size.
    """
    words = [answer.split() for answer in answers]
    length = sum(map(len, words)) / max(1, len(words))
    shares = [f"{'words' if n == 1 else f'{n}-grams'} {distinct(words, n):.3f}" for n in NGRAMS]
    return f"{length:.1f} words per answer, distinct {', '.join(shares)}"


def distinct(answers: Sequence[Sequence[str]], n: int) -> float:
    """Return the number of different n-grams per n-gram (distinct-n, arXiv 1510.03055); 0 if there are none."""
    ngrams = [tuple(words[start : start + n]) for words in answers for start in range(len(words) - n + 1)]
    return len({*ngrams}) / max(1, len(ngrams))
