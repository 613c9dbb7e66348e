"""The pages in a real headless Chromium: they load nothing, show every section, and their texts stay text.

The numbers and rows that a page shows are computed here from the files of the run or evaluation.
"""

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.report import page_of
from irlfast.reports.page import write_report
from tests.helpers.pages import CHROMIUM, LOW_CONTRAST, PHONE, all_rows, chromium, open_page, rows_shown
from tests.helpers.runs import run
from tests.helpers.tiers import full, slow
from tests.reports.test_other_pages import PROMPTS, evaluation

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM}")
PHASES = ("sft", "stage-00", "stage-01")
SECTIONS = ("Held-out prompts", "Where the time went", "Training", "The data", "Samples", "How to make it again")
WORDS = "the cat sat on a mat <b> &amp; Straße ÉTÉ 12:30 \u05d0\u05d1".split()
TITLES = {"exact_match": "exact match", "nll": "demonstration nll", "margin": "margin"}
HOSTILE_NAME = "run/<img src=x onerror=hacked=1>"
DRAWN = 120  # rows: three pages of them


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def drawn(finished, tmp_path_factory):
    """A finished run whose answers are drawn, and its rows: phase -> rows. Some figures and one answer are missing."""
    folder = without_weights(finished[0], tmp_path_factory.mktemp("drawn") / "run")
    draw = random.Random(0)
    phases: dict[str, list[dict[str, Any]]] = {phase: [] for phase in PHASES}
    for number in range(DRAWN):
        prompt, expert = (" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(2))
        for phase, rows in phases.items():
            answer = expert if draw.random() < 0.5 else " ".join(draw.choices(WORDS, k=draw.randint(0, 30)))
            figures = {"exact_match": float(answer == expert), "nll": round(draw.uniform(0, 30), draw.randint(0, 9))}
            if draw.random() < 0.7:
                figures["margin"] = draw.choice([-1.5, 0.0, draw.uniform(-4, 4)])
            tokens = [[token, draw.uniform(-9, 0)] for token in re.findall(r"\S+|\s+", expert)]
            row = {"prompt": prompt, "expert": expert, "answer": answer, "figures": figures, "expert_tokens": tokens}
            rows.append(row if (phase, number) != ("stage-00", 7) else {"prompt": prompt, "expert": expert})
    for phase, rows in phases.items():
        write_rows(folder / phase / "answers.jsonl", rows)
    return write_report(folder), phases


def without_weights(run: Path, copy: Path) -> Path:
    return Path(shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.safetensors", "samples", "report.html")))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_page(page, events: list[str]) -> None:
    """Check that a page loaded and raised nothing, drew its charts, and shows every section."""
    assert events == []
    titles = page.locator("h2").all_inner_texts()
    for section in SECTIONS:
        assert any(title.startswith(section) for title in titles), section
    assert all(title.is_visible() for title in page.locator("h2").all())
    assert page.locator(".chart").count() == page.locator(".chart svg").count() > 0
    assert page.locator("#samples-rows > li").count() > 0


def test_the_page_of_a_run_shows_every_section_and_loads_nothing(browser, finished):
    page, events = open_page(browser, write_report(finished[0]))
    check_page(page, events)
    page.close()


@full
def test_the_page_of_a_run_with_a_reward_model_shows_every_section_and_loads_nothing(browser, tmp_path):
    run(tmp_path / "run", method="rft", stages=1, inner_steps=2, align_rounds=1, num_generations=2)
    page, events = open_page(browser, write_report(tmp_path / "run"))
    check_page(page, events)
    assert page.locator("h2", has_text="Leaks").is_visible()
    page.close()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of an evaluation whose model has a hostile name, and the judge's outcomes."""
    folder = evaluation(tmp_path_factory.mktemp("compared") / "<b>", ("base", HOSTILE_NAME), "<i>prompt")
    outcomes = [random.Random(number).choice([1.0, 0.5, 0.0, None]) for number in range(PROMPTS)]
    (folder / "judge" / HOSTILE_NAME).mkdir(parents=True)
    write_rows(folder / "judge" / HOSTILE_NAME / "outcomes.jsonl", [{"outcome": outcome} for outcome in outcomes])
    path = folder / "report.html"
    path.write_text(page_of([folder]))
    return path, outcomes


def test_the_page_of_an_evaluation_loads_nothing_and_names_stay_text(browser, compared):
    page, events = open_page(browser, compared[0], color_scheme="dark")
    assert events == []
    assert page.evaluate("window.hacked") is None
    assert page.locator("h2", has_text="Differences to base").is_visible()
    assert page.locator(".chart").count() == page.locator(".chart svg").count() > 0
    assert page.get_by_label("Change to").locator("option").all_inner_texts() == ["base", HOSTILE_NAME]
    assert page.evaluate(LOW_CONTRAST) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.close()


def test_the_judges_wins_and_losses_are_filters(browser, compared):
    path, outcomes = compared
    page, _ = open_page(browser, path)
    choice = page.get_by_label("Show", exact=True)
    for word, outcome in (("better", 1.0), ("worse", 0.0), ("equal", 0.5)):
        numbers = [number for number, each in enumerate(outcomes, 1) if each == outcome]
        choice.select_option(f"win rate by the judge: {word} ({len(numbers)})")
        assert [row["number"] for row in all_rows(page)] == numbers
    page.close()


def test_a_search_opens_the_samples_that_contain_the_words(browser, compared):
    page, events = open_page(browser, compared[0])
    samples = page.locator("#samples-rows details")
    assert {*samples.locator("summary").all_inner_texts()} == {"4 samples"}
    assert not any(samples.evaluate_all("all => all.map((each) => each.open)"))
    page.get_by_label("Search", exact=True).fill(f"{HOSTILE_NAME} draws 17.2")
    assert [row["number"] for row in all_rows(page)] == [18]
    assert samples.evaluate_all("all => all.map((each) => each.open)") == [False, True]
    texts = [f"{HOSTILE_NAME} draws 17.{number} for <i>prompt" for number in range(4)]
    assert samples.last.locator(".text").all_inner_texts() == texts
    page.get_by_label("all figures").check()
    assert samples.last.locator("dt").all_inner_texts() == ["exact match"] * 4
    assert events == []
    page.close()


def test_the_page_of_several_runs_loads_nothing(browser, finished, drawn, tmp_path):
    path = tmp_path / "runs.html"
    path.write_text(page_of([finished[0], drawn[0].parent]))
    page, events = open_page(browser, path, viewport=PHONE)
    assert events == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate(LOW_CONTRAST) == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser, drawn, scheme):
    page, _ = open_page(browser, drawn[0], color_scheme=scheme)
    page.get_by_label("colour the expert's tokens").check()
    page.get_by_label("all figures").check()
    page.locator("details").evaluate_all("all => all.forEach((each) => { each.open = true; })")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 3 * 64) == (scheme == "dark")
    assert page.evaluate(LOW_CONTRAST) == []
    page.close()


def test_a_phone_shows_the_answers_one_under_another_and_scrolls_only_down(browser, drawn):
    page, _ = open_page(browser, drawn[0], viewport=PHONE)
    page.get_by_label("all figures").check()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = [cell.bounding_box() for cell in page.locator("#samples-rows > li").first.locator(".cell").all()]
    assert len(boxes) == 4
    assert len({box["x"] for box in boxes}) == 1
    assert [box["y"] for box in boxes] == sorted({box["y"] for box in boxes})
    page.close()


def test_the_answers_and_figures_are_those_of_the_files(browser, drawn):
    path, phases = drawn
    page, _ = open_page(browser, path)
    for phase in PHASES:
        page.get_by_label(phase, exact=True).and_(page.get_by_role("checkbox")).check()
    page.get_by_label("all figures").check()
    rows = all_rows(page)
    assert [row["number"] for row in rows] == [*range(1, DRAWN + 1)]
    for number, row in enumerate(rows):
        expert = phases["sft"][number]["expert"]
        assert row["prompt"] == phases["sft"][number]["prompt"]
        assert row["answers"] == {"expert": expert} | {phase: phases[phase][number].get("answer") for phase in PHASES}
        for phase in PHASES:
            shown = row["figures"][phase]
            figures = phases[phase][number].get("figures", {})
            assert shown[::2] == [TITLES[name] for name in figures]
            assert [float(value) for value in shown[1::2]] == pytest.approx([*figures.values()], rel=5e-3, abs=5e-4)
    page.close()


def test_a_search_keeps_the_rows_whose_texts_contain_the_words(browser, drawn):
    path, phases = drawn
    page, _ = open_page(browser, path)
    for words in ("strasse", "straße", "été", "cat sat", "<b>", "mat 12:30", "nothing has this", ""):
        page.get_by_label("Search", exact=True).fill(words)
        expected = []
        for number in range(DRAWN):
            first, kept = phases["sft"][number], phases["stage-01"][number]
            texts = [first["prompt"], first["expert"], first["answer"], kept["answer"]]
            if any(words in text.lower() for text in texts):
                expected.append(number + 1)
        assert [row["number"] for row in all_rows(page)] == expected, words
        assert page.get_by_role("status").inner_text() == f"{len(expected)} of {DRAWN} prompts"
    page.close()


def figure_of(row: dict[str, Any], name: str) -> float:
    return row.get("figures", {}).get(name, math.nan)


def rows_by_filter(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The filters' names and the numbers of their rows, for figures of which a low nll is good."""
    pairs = [*enumerate(zip(before, after, strict=True), 1)]
    right = {number: (figure_of(one, "exact_match"), figure_of(two, "exact_match")) for number, (one, two) in pairs}
    filters = {
        "all prompts": [number for number, _ in pairs],
        "answer changed": [number for number, (one, two) in pairs if one.get("answer") != two.get("answer")],
        "gained": [number for number in right if right[number] == (0, 1)],
        "lost": [number for number in right if right[number] == (1, 0)],
        "kept right": [number for number in right if right[number] == (1, 1)],
        "never right": [number for number in right if right[number] == (0, 0)],
    }
    for name, title, sign in (("nll", "demonstration nll", -1), ("margin", "margin", 1)):
        change = {number: sign * (figure_of(two, name) - figure_of(one, name)) for number, (one, two) in pairs}
        filters[f"{title}: better"] = [number for number in change if change[number] > 0]
        filters[f"{title}: worse"] = [number for number in change if change[number] < 0]
        filters[f"{title}: equal"] = [number for number in change if change[number] == 0]
    return filters


@pytest.mark.parametrize(("first", "kept"), [("sft", "stage-01"), ("stage-00", "sft")])
def test_a_filter_shows_the_rows_that_it_counts(browser, drawn, first, kept):
    path, phases = drawn
    page, _ = open_page(browser, path)
    page.get_by_label("Change from").select_option(first)
    page.get_by_label("Change to").select_option(kept)
    choice = page.get_by_label("Show", exact=True)
    filters = rows_by_filter(phases[first], phases[kept])
    options = choice.locator("option").all_inner_texts()
    assert options == [f"{name} ({len(numbers)})" for name, numbers in filters.items()]
    for option, numbers in zip(options, filters.values(), strict=True):
        choice.select_option(option)
        assert [row["number"] for row in all_rows(page)] == numbers, option
    page.close()


def test_the_sentence_above_the_rows_counts_what_the_filters_show(browser, drawn):
    page, _ = open_page(browser, drawn[0])
    sentence = page.locator("#samples > .hint").first.inner_text()
    phases = drawn[1]
    filters = rows_by_filter(phases["sft"], phases["stage-01"])
    for words, name in (
        ("became identical", "gained"),
        ("stopped being identical", "lost"),
        ("stayed identical", "kept right"),
        ("stayed different", "never right"),
    ):
        assert re.search(rf"\b{len(filters[name])} (answers )?{words}", sentence), name
    page.close()


def test_rows_are_sorted_by_what_the_order_names_and_missing_values_come_last(browser, drawn):
    path, phases = drawn
    page, _ = open_page(browser, path)
    sft, kept = phases["sft"], phases["stage-01"]
    orders = {
        "as in the file": [*range(DRAWN)],
        "length of the prompt": [len(row["prompt"]) for row in sft],
        "length of the expert's answer": [len(row["expert"]) for row in sft],
        "length of the answer of stage-01": [len(row["answer"]) for row in kept],
    }
    for name, title in TITLES.items():
        orders[f"{title} of stage-01"] = [figure_of(row, name) for row in kept]
        orders[f"change of {title}"] = [
            figure_of(two, name) - figure_of(one, name) for one, two in zip(sft, kept, strict=True)
        ]
    choice = page.get_by_label("Order")
    assert choice.locator("option").all_inner_texts() == [*orders]
    for name, values in orders.items():
        choice.select_option(name)
        for sign in (1, -1):
            page.get_by_label("descending").set_checked(sign < 0)
            shown = [values[row["number"] - 1] for row in all_rows(page)]
            known = [value for value in shown if not math.isnan(value)]
            assert len(shown) == DRAWN
            assert known == sorted(known, key=lambda value: sign * value)
            assert not any(math.isnan(value) for value in shown[: len(known)])
    page.close()


def test_the_keyboard_alone_searches_filters_and_turns_pages(browser, drawn):
    page, _ = open_page(browser, drawn[0])
    page.get_by_label("Search", exact=True).focus()
    page.keyboard.type("cat")
    searched = page.get_by_role("status").inner_text()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert page.get_by_label("Show", exact=True).locator("option:checked").inner_text().startswith("answer changed")
    assert page.get_by_role("status").inner_text() != searched
    page.keyboard.press("ArrowUp")
    first = rows_shown(page)
    page.get_by_role("button", name="Next").focus()
    page.keyboard.press("Enter")
    assert page.locator("#samples-page").inner_text().startswith("page 2 of")
    assert {row["number"] for row in rows_shown(page)}.isdisjoint(row["number"] for row in first)
    page.close()


def test_a_token_has_the_difference_of_its_two_log_probabilities(browser, drawn):
    path, phases = drawn
    page, _ = open_page(browser, path)
    page.get_by_label("colour the expert's tokens").check()
    for row, sft, kept in zip(all_rows(page), phases["sft"], phases["stage-01"], strict=True):
        assert [text for text, _, _ in row["tokens"]] == [text for text, _ in sft["expert_tokens"]]
        pairs = zip(row["tokens"], sft["expert_tokens"], kept["expert_tokens"], strict=True)
        for (_, title, kind), (_, before), (_, after) in pairs:
            assert float(title.removesuffix(" nats")) == pytest.approx(after - before, abs=0.006)
            assert kind.split()[1:] == ([] if abs(after - before) < 0.1 else ["more"] if after > before else ["less"])
    page.close()


HOSTILE = (
    "<script>hacked=1</script>",
    "</script><script>hacked=1</script>",
    "<img src=x onerror=hacked=1>",
    "<!--<script>",
    "]]>",
    "\"'><svg onload=hacked=1>",
    "{{ 7 * 7 }}",
    "${hacked=1}",
    "javascript:hacked=1",
    "&lt;b&gt;",
    "\u2028",
    "\u202e",
    "\\u003cscript>",
    "__proto__",
)
texts = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=4).map("".join)


@pytest.mark.parametrize("examples", [2, pytest.param(20, marks=slow)])
def test_hostile_texts_stay_text(browser, finished, tmp_path, examples):
    folder = without_weights(finished[0], tmp_path / "run")
    config = (folder / "config.yaml").read_text()

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(texts, texts, texts, texts), min_size=10, max_size=40), texts)
    def property_holds(rows, name):
        (folder / "config.yaml").write_text(config.replace("method: irft", f"method: irft\nx: {json.dumps(name)}"))
        for phase in PHASES:
            written = [
                {"prompt": prompt, "expert": expert, "answer": answer, "figures": {figure: 1.5}}
                for prompt, expert, answer, figure in rows
            ]
            write_rows(folder / phase / "answers.jsonl", written)
        page, events = open_page(browser, write_report(folder))
        page.get_by_label("all figures").check()
        shown = [(row["prompt"], *row["answers"].values()) for row in rows_shown(page)]
        assert shown == [(prompt, expert, answer, answer) for prompt, expert, answer, _ in rows]
        assert page.evaluate("window.hacked") is None
        assert events == []
        page.close()

    property_holds()
