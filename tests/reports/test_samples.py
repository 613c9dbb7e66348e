"""The data of the sample browser: answers joined prompt by prompt, split at their differences, bounded and counted."""

import json
from itertools import zip_longest

from hypothesis import given
from hypothesis import strategies as st

from irlfast.reports import browser
from irlfast.reports.browser import CHARACTERS, PROMPTS, SAMPLES, clip, evaluation_samples, pieces, samples

texts = st.text(st.sampled_from("ab \n.é<"), max_size=30)


def text_of(split, kinds: str) -> str:
    return "".join(text for kind, text in split if kind in kinds)


@given(texts, texts)
def test_the_pieces_of_an_answer_make_the_answer_and_those_of_the_expert_the_experts(expert, answer):
    split = pieces(expert, answer)
    assert text_of(split, "=+") == answer
    if any(kind == "-" for kind, _ in split):
        assert text_of(split, "=-") == expert
    assert all(text for _, text in split)


def test_missing_words_come_before_those_that_stand_in_for_them_and_only_in_close_answers():
    assert pieces("the cat sat", "the <dog> sat") == [["=", "the "], ["-", "cat"], ["+", "<dog>"], ["=", " sat"]]
    assert not any(kind == "-" for kind, _ in pieces("one two three four", "five"))


def test_a_text_is_clipped_and_says_how_much_is_left_out():
    assert clip("x" * CHARACTERS) == "x" * CHARACTERS
    assert clip("x" * (CHARACTERS + 1)).endswith("… (1 more characters)")


def row(number: int, answer: str, **more) -> dict:
    return {"prompt": f"prompt {number}", "expert": "yes", "answer": answer, **more}


def test_the_page_has_a_thousand_prompts_and_counts_the_others():
    before = [row(number, "yes" if number % 2 else "no") for number in range(PROMPTS + 500)]
    after = [row(number, "yes" if number % 3 else "no") for number in range(PROMPTS + 500)]
    result = samples({"one": iter(before), "two": iter(after)}, "one", "two")
    assert len(result["data"]["rows"]) == result["shown"] == PROMPTS
    assert result["total"] == PROMPTS + 500
    assert result["counts"] == {"kept": 500, "gained": 500, "lost": 250, "never": 250}


def test_the_page_has_the_first_prompts_whose_json_fits(monkeypatch):
    monkeypatch.setattr(browser, "BYTES", 5000)
    rows = [row(number, "<" * 100) for number in range(40)]
    result = samples({"one": rows}, "one", "one")
    assert [shown["number"] for shown in result["data"]["rows"]] == [*range(1, result["shown"] + 1)]
    assert 0 < result["shown"] < result["total"] == 40
    assert len(json.dumps(result["data"]["rows"]).replace("<", "\\u003c")) <= 5000


def test_an_answer_to_another_prompt_counts_as_missing():
    whole = [row(number, "yes") for number in range(4)]
    broken = [whole[0], *whole[2:]]  # a line could not be read, and the later ones moved up
    result = samples({"one": whole, "two": broken}, "one", "two")
    answers = [shown["answers"][1] for shown in result["data"]["rows"]]
    assert [answer is None for answer in answers] == [False, True, True, True]
    assert result["counts"] == {"kept": 1, "gained": 0, "lost": 0, "never": 0}


def test_a_figure_that_is_no_finite_number_is_missing():
    rows = [row(0, "no", figures={"nll": float("nan"), "margin": float("inf"), "reward": "high", "length": 3})]
    [shown] = samples({"one": rows}, "one", "one")["data"]["rows"]
    assert shown["answers"][0]["figures"] == {
        "nll": None,
        "margin": None,
        "reward": None,
        "length": 3.0,
        "exact_match": 0.0,
    }


def test_tokens_are_coloured_only_where_each_has_a_finite_log_probability():
    rows = [row(0, "no", expert_tokens=[["y", -0.5], ["es", last]]) for last in (-1.0, float("-inf"))]
    shown = [each["answers"][0] for each in samples({"one": rows}, "one", "one")["data"]["rows"]]
    assert shown[0]["tokens"] == [["y", -0.5], ["es", -1.0]]
    assert "tokens" not in shown[1]


def write(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def evaluation(folder, models: dict[str, list[str]], outcomes: dict[str, list]) -> None:
    """Write an evaluation of models with these answers, in parts of 256."""
    answers = [*zip_longest(*models.values())]
    write(folder / "prompts.jsonl", ({"prompt": f"p{number}", "expert": "yes"} for number in range(len(answers))))
    for name, texts_of_model in models.items():
        for part in range(0, len(texts_of_model), 256):
            rows = ({"answer": text, "figures": {"nll": 1.0}} for text in texts_of_model[part : part + 256])
            write(folder / "models" / name / f"part-{part // 256:05d}.jsonl", rows)
    for name, each in outcomes.items():
        write(folder / "judge" / name / "outcomes.jsonl", ({"outcome": outcome} for outcome in each))


def test_the_models_of_an_evaluation_are_joined_over_parts_and_have_the_judges_outcomes(tmp_path):
    base, other = ["no"] * 600, ["no"] * 599 + ["yes"]
    outcomes = [1.0, 0.0, 0.5, None] * 150
    evaluation(tmp_path, {"base": base, "run/other": other}, {"run/other": outcomes})
    notes: list[str] = []
    result = evaluation_samples(tmp_path, ["base", "run/other"], notes)
    rows = result["data"]["rows"]
    assert [shown["prompt"] for shown in rows] == [f"p{number}" for number in range(600)]
    assert [shown["answers"][1]["figures"].get("win_rate") for shown in rows] == outcomes
    assert {shown["answers"][0]["figures"]["win_rate"] for shown in rows} == {0.5}
    assert result["counts"] == {"kept": 0, "gained": 1, "lost": 0, "never": 599}
    assert notes == []


def test_an_evaluation_that_was_stopped_shows_the_answers_that_it_has(tmp_path):
    evaluation(tmp_path, {"base": ["no"] * 600, "other": ["yes"] * 256}, {})
    result = evaluation_samples(tmp_path, ["base", "other"], [])
    answers = [shown["answers"][1] for shown in result["data"]["rows"]]
    assert [answer is not None for answer in answers] == [True] * 256 + [False] * 344
    assert result["counts"]["gained"] == 256


def test_the_samples_of_an_answer_come_with_their_figures_and_the_rest_is_counted():
    drawn = [f"sample {number}" for number in range(SAMPLES + 3)]
    rewards = [0.5, None, *range(SAMPLES)]  # one too few
    rows = [row(0, "no", samples=drawn, sample_figures={"reward/one": rewards, "kl": "none"}), row(1, "no", samples=7)]
    first, second = samples({"one": rows}, "one", "one")["data"]["rows"]
    [answer] = first["answers"]
    assert [sample["text"] for sample in answer["samples"]] == drawn[:SAMPLES]
    assert [sample["figures"]["reward/one"] for sample in answer["samples"]] == rewards[:SAMPLES]
    assert answer["sample_count"] == SAMPLES + 3
    assert "samples" not in second["answers"][0]
