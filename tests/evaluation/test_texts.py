"""Figures of texts agree with the libraries that define them, in every script, also for empty answers."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_bleu

from irlfast.common.files import InputError
from irlfast.evaluation.texts import diversity_figures, load_scorer, text_figures, units, words

ROUGE = RougeScorer(["rougeL"])
# Letters of several scripts, marks, digits, punctuation, white space and a character beyond 16 bits.
TEXTS = st.text("abcXYZ019 .,!\n\t你好世界こんにちはไทยहिन्दीעבריתéé😀𠀀", max_size=30)
RATIOS = ("rouge_l", "edit_similarity", "repetition", "exact_match", "distinct_1", "distinct_2", "self_bleu")


def editing(one: str, other: str) -> int:
    """Levenshtein's distance by its recurrence."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b)))
    return row[-1]


@settings(max_examples=200, deadline=None)
@given(st.text("abcdE, .'", max_size=25), st.text("abcdE, .'", max_size=25))
def test_rouge_l_of_ascii_texts_is_that_of_rouge_score(answer, expert):
    if words(answer) or words(expert):  # rouge-score says 0 of two texts without words, which are equal
        own = text_figures(answer, expert)["rouge_l"]
        assert own == pytest.approx(ROUGE.score(expert, answer)["rougeL"].fmeasure)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_the_edit_distance_is_levenshteins_in_characters(answer, expert):
    figures, (answer, expert) = text_figures(answer, expert), (answer.strip(), expert.strip())
    distance = editing(answer, expert)
    assert figures["edit_distance"] == distance
    longer = max(len(answer), len(expert))
    assert figures["edit_similarity"] == pytest.approx(1 - distance / longer if longer else 1.0)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=4))
def test_every_ratio_lies_between_0_and_1_and_an_answer_equals_itself(text, samples):
    figures = text_figures(text, text) | diversity_figures(samples)
    assert all(-1e-9 <= figures[name] <= 1 + 1e-9 for name in RATIOS if name in figures)
    assert (figures["exact_match"], figures["rouge_l"], figures["edit_similarity"]) == (1, 1, 1)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_units_lose_nothing_but_white_space(text):
    assert "".join(units(text)) == "".join(text.split())


def test_words_of_scripts_without_spaces_are_characters():
    assert words("我喜欢 Python 3") == ["我", "喜", "欢", "python", "3"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # vowel signs stay with their letters
    assert units("Yes, 好!") == ["Yes", ",", "好", "!"]


def test_chinese_answers_are_compared_by_characters():
    figures = text_figures("我很喜欢猫", "我喜欢狗")
    assert figures["rouge_l"] == pytest.approx(2 * 3 / 9)  # 我喜欢
    assert ROUGE.score("我喜欢狗", "我很喜欢猫")["rougeL"].fmeasure == 0.0  # the package has no word of them
    assert figures["edit_distance"] == 2 and figures["exact_match"] == 0


def test_an_empty_answer_has_no_likeness_and_no_repetition():
    assert text_figures("", "yes") == {
        "repetition": 0,
        "exact_match": 0,
        "rouge_l": 0,
        "edit_distance": 3,
        "edit_similarity": 0,
    }


def test_without_an_expert_nothing_is_compared():
    assert text_figures("some words", None) == {"repetition": 0.0}


def test_white_space_around_an_answer_does_not_count():
    assert text_figures(" yes\n", "yes")["exact_match"] == 1.0


def test_repetition_is_the_share_of_4_grams_that_came_before():
    assert text_figures("a b c d", None)["repetition"] == 0.0
    assert text_figures("a b c d a b c d", None)["repetition"] == pytest.approx(1 / 5)
    assert text_figures("!" * 10, None)["repetition"] == pytest.approx(6 / 7)
    assert text_figures("哈" * 10, None)["repetition"] == pytest.approx(6 / 7)
    assert text_figures("ok", None)["repetition"] == 0.0


def test_self_bleu_is_the_mean_of_sacrebleus_sentences():
    samples = ["the cat sat on the mat", "the cat sat on a mat today", "dogs bark"]
    scores = [
        sentence_bleu(text, samples[:i] + samples[i + 1 :], tokenize="none", use_effective_order=True).score
        for i, text in enumerate(samples)
    ]
    assert diversity_figures(samples)["self_bleu"] == pytest.approx(sum(scores) / 300)


def test_samples_that_are_all_alike_have_the_least_diversity():
    alike, apart = diversity_figures(["a b c d e"] * 3), diversity_figures(["a b c d e", "f g h i j", "k l m n o"])
    assert alike["self_bleu"] == pytest.approx(1) and apart["self_bleu"] < 0.1
    assert alike["distinct_1"] == pytest.approx(1 / 3) and apart["distinct_1"] == 1


def test_a_figure_of_samples_is_absent_where_there_is_nothing_to_compare():
    assert diversity_figures([]) == {} and diversity_figures(["", " "]) == {}
    assert diversity_figures(["one"]) == {"distinct_1": 1.0}
    assert set(diversity_figures(["one two", ""])) == {"distinct_1", "distinct_2"}


# ---------------------------------------------------------------- a user's function


@pytest.fixture
def scorer(tmp_path):
    """Write a scorer's body into a file of its own, and load it."""

    def load(body: str, name: str = "grade"):
        path = tmp_path / f"scorer{random.randrange(10**9)}.py"
        path.write_text(f"def {name}(prompt, answer, expert, row):\n    {body}\n")
        return load_scorer(f"{path}:{name}")

    return load


def test_a_number_has_the_functions_name_and_a_dictionary_its_own(scorer):
    row = {"level": 3, "prompt": "p"}
    assert scorer("return len(answer) / len(expert)")("p", "ab", "abcd", row) == {"grade": 0.5}
    assert scorer("return {'level': row['level'], 'known': answer in prompt}")("a p", "a", None, row) == {
        "level": 3.0,
        "known": 1.0,
    }
    assert scorer("return {'level': None, 'known': 1}")("p", "a", None, row) == {"known": 1.0}
    assert scorer("return None")("p", "a", None, row) == {}


@pytest.mark.parametrize(
    "body, message",
    [
        ("return 'good'", r"scorer .*:grade: found 'good' for the answer 'an answer', expected a number"),
        ("return math.nan", r"scorer .*:grade: it failed \(NameError: name 'math' is not defined, scorer.* line 2\)"),
        ("return float('inf')", r"scorer .*:grade: found inf for the answer"),
        ("return {'exact_match': 1}", r"scorer .*:grade: found a score 'exact_match', which is another figure's name"),
        ("return [1, 2]", r"scorer .*:grade: found \[1, 2\] for the answer"),
    ],
)
def test_what_is_no_score_is_refused_in_one_sentence_that_names_the_function(scorer, body, message):
    with pytest.raises(InputError, match=message):
        scorer(body)("p", "an answer", None, {})


def test_a_scorer_that_cannot_be_imported_is_refused():
    with pytest.raises(InputError, match=r"scorer no\.such:thing: cannot be imported"):
        load_scorer("no.such:thing")
