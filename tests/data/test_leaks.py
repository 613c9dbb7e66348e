"""Each leak is found by its own check, and pairs without a leak show none."""

import random
from types import SimpleNamespace

import pytest

from irlfast.data.encoding import Encoder
from irlfast.data.leaks import HIGH, REMEDIES, find_leaks, log_leaks
from irlfast.data.packing import PromptGroup

END, SPECIAL = 0, 1
FORM = Encoder(SimpleNamespace(all_special_ids=[END, SPECIAL]), None, [], END, (END,), True)


def answer(rng: random.Random, length: int, words: range = range(2, 30), end: bool = True) -> list[int]:
    return [rng.choice(words) for _ in range(length)] + [END] * end


def pairs_of(kind: str, count: int = 200) -> list[PromptGroup]:
    rng = random.Random(0)
    pairs = []
    for _ in range(count):
        expert, synthetic = answer(rng, 6), answer(rng, 6)
        if kind == "length":
            synthetic = answer(rng, rng.choice([3, 9]))
        elif kind == "end token":
            synthetic = answer(rng, 6, end=False)
        elif kind == "truncation":
            synthetic = answer(rng, 12, end=False)
        elif kind == "special tokens":
            expert[2] = SPECIAL
        elif kind == "bag of tokens":
            synthetic = answer(rng, 6, range(20, 40))
        pairs.append(PromptGroup([5], (expert, synthetic)))
    return pairs


@pytest.mark.parametrize("kind", REMEDIES)
def test_a_leak_is_found_and_its_remedy_printed(kind, capsys):
    leaks = find_leaks(pairs_of(kind), FORM, max_new_tokens=12)
    assert leaks[kind] > HIGH
    log_leaks(leaks, "stage-00")
    shown = " ".join(capsys.readouterr().err.split())
    assert "warning: " in shown
    assert REMEDIES[kind].split(",")[0].split()[0] in shown


def test_answers_of_one_kind_show_no_leak(capsys):
    leaks = find_leaks(pairs_of("none", 500), FORM, max_new_tokens=12)
    assert set(leaks) == set(REMEDIES)
    assert all(0.4 < accuracy < 0.6 for accuracy in leaks.values()), leaks
    log_leaks(leaks, "stage-00")
    assert "warning" not in capsys.readouterr().err


def test_too_few_pairs_give_no_accuracies(capsys):
    leaks = find_leaks(pairs_of("length", 4), FORM, max_new_tokens=12)
    assert leaks == {}
    log_leaks(leaks, "stage-00")
    assert capsys.readouterr().err == ""
