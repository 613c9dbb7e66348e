"""figures.json is made from rows alone: means, intervals, tests, verdicts and curves that can be computed by hand."""

import json
import math
import time

import numpy as np
import pytest
import torch
import transformers
import yaml
from scipy import stats

from irlfast.common.files import InputError, read_json, write_jsonl
from irlfast.evaluation import statistics
from irlfast.evaluation.figures import FIGURES
from irlfast.evaluation.statistics import holm, mean_interval, pooled, share_interval
from irlfast.evaluation.table import verdict, write_figures
from irlfast.evaluation.texts import text_figures
from irlfast.sampling.shards import DRAWN
from irlfast.sampling.transformers_sampler import generate_batch
from tests.helpers.runs import ROOT
from tests.helpers.tiers import full, slow


def evaluation(folder, models, part=64, **settings):
    """Write the rows of models into an evaluation's folder, in parts, and return its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"models": {name: f"/{name}" for name in models}, "beta": 0.1} | settings
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    for name, rows in models.items():
        for number, start in enumerate(range(0, len(rows), part)):
            write_jsonl(folder / "models" / name / f"part-{number:05d}.jsonl", rows[start : start + part])
    figures = write_figures(folder)
    assert read_json(folder / "figures.json") == figures
    return figures


def rows_of(figures=None, sample_figures=None, expert_tokens=None):
    """Make rows from arrays [P] of figures and [P, n] of sample figures; NaN leaves a figure out."""
    figures, sample_figures = figures or {}, sample_figures or {}
    count = len(next(iter([*figures.values(), *sample_figures.values()])))
    return [
        {
            "answer": "a",
            "samples": ["a"],
            "figures": {name: float(own[i]) for name, own in figures.items() if not math.isnan(own[i])},
            "sample_figures": {name: [float(x) for x in own[i]] for name, own in sample_figures.items()},
            "expert_tokens": [["a", float(x)] for x in expert_tokens[i]] if expert_tokens is not None else [],
        }
        for i in range(count)
    ]


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 499)


def test_means_and_intervals_are_those_of_the_rows_values(tmp_path, generator):
    exact, length = generator.binomial(1, 0.3, 150).astype(float), generator.poisson(20, 150).astype(float)
    own = evaluation(tmp_path, {"base": rows_of({"exact_match": exact, "length": length})})
    expected = {"exact_match": share_interval(exact), "length": mean_interval(length)}
    for name, interval in expected.items():
        assert own["models"]["base"][name] == {**interval._asdict(), "count": 150}
    assert own["baseline"] == "base" and own["differences"] == {}


def test_a_prompt_without_a_figure_does_not_count(tmp_path, generator):
    values = generator.normal(size=90)
    some = np.where(np.arange(90) % 3 == 0, np.nan, values)
    own = evaluation(tmp_path, {"base": rows_of({"margin": some, "nll": values})}, part=7)
    assert own["models"]["base"]["margin"]["count"] == 60
    assert own["models"]["base"]["margin"]["mean"] == pytest.approx(np.nanmean(some))


def test_the_nll_per_token_is_that_of_all_tokens_together(tmp_path, generator):
    tokens = [generator.gamma(2, size=size) for size in generator.integers(1, 30, 80)]
    figures = {"nll_per_token": np.array([own.mean() for own in tokens])}
    own = evaluation(tmp_path, {"base": rows_of(figures, expert_tokens=[-each for each in tokens])})
    assert own["models"]["base"]["nll_per_token"]["mean"] == pytest.approx(np.concatenate(tokens).mean(), rel=1e-5)


def test_samples_of_a_prompt_are_one_value_of_their_mean(tmp_path, generator):
    right = generator.binomial(1, 0.4, (100, 4)).astype(float)
    own = evaluation(tmp_path, {"base": rows_of({"exact_match": right[:, 0]}, {"exact_match": right})})
    assert own["models"]["base"]["sampled_exact_match"] == {**share_interval(right.mean(1))._asdict(), "count": 100}
    assert own["models"]["base"]["exact_match"]["mean"] == pytest.approx(right[:, 0].mean())


def test_a_better_model_is_called_better_by_each_figure_in_its_direction(tmp_path, generator):
    hard = generator.random(400)
    base = {"exact_match": (hard < 0.3).astype(float), "nll": 10 + generator.normal(size=400)}
    new = {"exact_match": (hard < 0.5).astype(float), "nll": base["nll"] - 0.5 + 0.1 * generator.normal(size=400)}
    base["length"] = generator.poisson(20, 400).astype(float)
    new["length"] = base["length"] + 2
    models = {"base": rows_of(base), "new": rows_of(new), "worse": rows_of({"nll": base["nll"] + 1})}
    differences = evaluation(tmp_path, models)["differences"]
    new = differences["new"]
    assert {name: each["verdict"] for name, each in new.items()} == {
        "exact_match": "better",
        "nll": "better",
        "length": "higher",
    }
    assert [new[name]["better"] for name in ("exact_match", "nll", "length")] == [True, True, None]
    assert new["exact_match"]["test"] == "McNemar's, exact" and new["nll"]["test"] == "permutation"
    assert new["nll"]["low"] < -0.45 and new["nll"]["high"] > -0.55 and new["nll"]["mean"] < 0
    assert differences["worse"]["nll"]["verdict"] == "worse" and differences["worse"]["nll"]["better"] is False
    for each in differences.values():
        assert [own["p_holm"] for own in each.values()] == holm([own["p"] for own in each.values()])


@pytest.mark.parametrize("ties", [0, 60])
def test_the_win_rate_by_a_judge_is_compared_with_the_baselines_own(tmp_path, ties):
    """Prompts without verdicts do not count; each tie is half a win for both."""
    outcomes = [1.0] * 80 + [0.0] * 40 + [0.5] * ties + [None] * 30
    rows = rows_of({"length": np.full(len(outcomes), 7.0)})
    for name in ("better", "worse"):
        given = [each if each is None or name == "better" else 1 - each for each in outcomes]
        write_jsonl(tmp_path / "judge" / name / "outcomes.jsonl", [{"outcome": each} for each in given])
    figures = evaluation(tmp_path, {"base": rows, "better": rows, "worse": rows, "not judged": rows})
    judged, difference = (figures[part]["better"]["win_rate"] for part in ("models", "differences"))
    known = np.array([each for each in outcomes if each is not None])
    assert judged == {**share_interval(known)._asdict(), "count": len(known)}
    assert difference["mean"] == pytest.approx((80 - 40) / len(known))
    assert difference["p"] == pytest.approx(stats.binomtest(40, 120).pvalue)
    assert difference["better"] is True and figures["differences"]["worse"]["win_rate"]["better"] is False
    for name in ("base", "not judged"):
        assert "win_rate" not in figures["models"][name]
    assert "win_rate" not in figures["differences"]["not judged"]


def test_a_figure_that_one_model_lacks_is_not_compared(tmp_path, generator):
    values = generator.normal(size=50)
    own = evaluation(tmp_path, {"base": rows_of({"nll": values}), "new": rows_of({"nll": values, "margin": values})})
    assert set(own["differences"]["new"]) == {"nll"} and "margin" in own["models"]["new"]


def test_likelihoods_per_token_of_other_tokens_are_not_compared(tmp_path, generator):
    values = generator.gamma(2, size=30)
    base = rows_of({"nll_per_token": values}, expert_tokens=[[-1.0] * 5] * 30)
    new = rows_of({"nll_per_token": values}, expert_tokens=[[-1.0] * 6] * 30)
    assert evaluation(tmp_path, {"base": base, "new": new})["differences"]["new"] == {}


def test_no_difference_comes_with_the_prompts_that_would_show_one(tmp_path, generator):
    right = generator.binomial(1, 0.5, (2, 100)).astype(float)
    own = evaluation(tmp_path, {"base": rows_of({"exact_match": right[0]}), "new": rows_of({"exact_match": right[1]})})
    each = own["differences"]["new"]["exact_match"]
    assert 30_000 < each["needed"] < 50_000  # (1.96 + 0.84)² · 0.5 / 0.01²
    assert each["verdict"] == f"no difference shown; {each['needed']:,} prompts would show 1 point"


def test_equal_answers_show_no_difference_and_are_not_said_to_be_equal_for_sure(tmp_path, generator):
    rows = rows_of({"exact_match": generator.binomial(1, 0.5, 100).astype(float), "nll": generator.normal(size=100)})
    own = evaluation(tmp_path, {"base": rows, "new": rows})["differences"]["new"]
    assert own["exact_match"]["low"] < 0 < own["exact_match"]["high"]
    assert [each["p_holm"] for each in own.values()] == [1.0, 1.0]
    assert own["nll"]["verdict"].startswith("no difference shown") and own["nll"]["better"] is None


def test_one_prompt_has_no_interval_and_shows_no_difference(tmp_path):
    own = evaluation(tmp_path, {"base": rows_of({"nll": [1.0]}), "new": rows_of({"nll": [5.0]})})
    assert own["models"]["new"]["nll"] == {"mean": 5.0, "low": None, "high": None, "count": 1}
    assert own["differences"]["new"]["nll"]["verdict"].startswith("no difference shown")


def test_a_users_score_of_0_and_1_is_a_share_and_another_one_is_not(tmp_path, generator):
    right, grade = generator.binomial(1, 0.4, (2, 60)).astype(float), generator.uniform(size=(2, 60))
    models = {name: rows_of({"my_check": right[i], "grade": grade[i]}) for i, name in enumerate(("base", "new"))}
    own = evaluation(tmp_path, models)
    assert own["models"]["base"]["my_check"] == {**share_interval(right[0])._asdict(), "count": 60}
    each = own["differences"]["new"]
    assert each["my_check"]["test"] == "McNemar's, exact" and each["grade"]["test"] == "permutation"
    assert each["grade"]["point"] == "a tenth of the baseline's standard deviation"


def test_models_with_rows_of_other_prompts_are_refused(tmp_path):
    with pytest.raises(InputError, match="models/new: found rows of 3 prompts, expected those of 4, as base has"):
        evaluation(tmp_path, {"base": rows_of({"nll": [1.0] * 4}), "new": rows_of({"nll": [1.0] * 3})})
    with pytest.raises(InputError, match="found no rows"):
        evaluation(tmp_path / "empty", {"base": []})


def test_a_row_with_fewer_samples_than_the_others_is_refused_by_its_line(tmp_path):
    rows = rows_of({}, {"exact_match": np.ones((5, 3))})
    rows[3]["sample_figures"]["exact_match"].pop()
    with pytest.raises(InputError, match=r"part-00000\.jsonl, line 4: found 2 values of exact_match, expected 3"):
        evaluation(tmp_path, {"base": rows})


def test_models_of_several_seeds_are_pooled_against_the_baseline(tmp_path, generator):
    hard, names = generator.normal(size=80), ["run-0", "run-1", "run-2"]
    rows = {name: rows_of({"nll": hard + generator.normal(size=80) - 1}) for name in names}
    base = rows_of({"nll": hard})
    own = evaluation(tmp_path, {"base": base, **rows}, seeds={"run-*": names})["seeds"]["run-*"]
    values = np.array([[row["figures"]["nll"] for row in each] for each in [base, *rows.values()]])
    assert own["models"] == names
    each = own["differences"]["nll"]
    assert [each[name] for name in ("mean", "low", "high", "p")] == pytest.approx([*pooled(values[1:] - values[0])])
    assert each["verdict"] == "better" and each["seeds"] == 3 and each["count"] == 80


def test_two_methods_of_the_same_seeds_are_compared_seed_by_seed(tmp_path, generator):
    values = {name: generator.normal(size=40) for name in ("a-0", "a-1", "b-0", "b-1")}
    seeds = {"a-*": ["a-0", "a-1"], "b-*": ["b-0", "b-1"]}
    own = evaluation(tmp_path, {name: rows_of({"nll": each}) for name, each in values.items()}, seeds=seeds)["seeds"]
    assert [*own] == ["b-*"]
    differences = np.array([values["b-0"] - values["a-0"], values["b-1"] - values["a-1"]])
    assert own["b-*"]["differences"]["nll"]["mean"] == pytest.approx(pooled(differences).mean)


@pytest.mark.parametrize("cases", [30, pytest.param(200, marks=slow)])
def test_a_model_against_itself_with_another_seed_shows_no_difference_in_95_percent(
    tmp_path, generator, monkeypatch, cases
):
    """Each case draws new prompts and new samples, and has seven figures, of which none may be called different."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels calls it in Holm's correction
    shown = 0
    for case in range(cases):
        skill, models = generator.beta(1, 2, 60), {}
        for name in ("base", "new"):
            right = generator.random((60, 3)) < skill[:, None]
            grade = skill[:, None] + generator.gumbel(size=(60, 3))
            length = generator.geometric(0.05, size=60) + 20 * skill
            greedy = {"exact_match": right[:, 0], "edit_similarity": grade[:, 0], "length": length}
            greedy["ended"] = generator.random(60) < 0.97
            models[name] = rows_of(greedy, {"exact_match": right, "grade": grade, "ended": right})
        own = evaluation(tmp_path / str(case), models)["differences"]["new"]
        shown += not all(each["verdict"].startswith("no difference shown") for each in own.values())
    assert shown / cases <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / cases)


@full
def test_a_real_policy_against_itself_shows_no_difference_in_95_percent(finished, tmp_path, monkeypatch):
    """200 pairs of its samples of 20 prompts, with the figures that an evaluation computes of them."""
    monkeypatch.setattr("gc.collect", lambda: 0)
    policy, cases = finished[0] / "final", 200
    model = transformers.AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    given = [json.loads(line) for line in (ROOT / "irlfast/demo/test.jsonl").read_text().splitlines()[:20]]
    drawn = []  # by prompt, a row for each sample
    for number, row in enumerate(given):
        asked = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)).input_ids
        end, seeds = tokenizer.eos_token_id, range(1000 * number, 1000 * number + 2 * cases)
        with torch.no_grad():
            answers = [each.ids for each in generate_batch(model, [ids] * (2 * cases), seeds, [end], DRAWN, 12)]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        lengths = [{"length": float(len(answer)), "ended": float(answer[-1] == end)} for answer in answers]
        drawn.append([own | text_figures(text, row["completion"]) for own, text in zip(lengths, texts, strict=True)])
    shown = 0
    for case in range(cases):
        models = {
            name: [{"answer": "", "figures": samples[2 * case + number]} for samples in drawn]
            for number, name in enumerate(("base", "new"))
        }
        own = evaluation(tmp_path / str(case), models)["differences"]["new"]
        assert len(own) == 7
        shown += not all(each["verdict"].startswith("no difference shown") for each in own.values())
    assert shown / cases <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / cases)


def test_every_figure_has_a_direction_that_the_verdict_knows():
    for name, figure in FIGURES.items():
        assert figure.better in ("higher", "lower", "") and figure.title and figure.unit, name
        assert figure.point is None or figure.point > 0
    lower = {"mean": -1.0, "p_holm": 0.01, "better": None, "needed": 5, "point": "1 point"}
    assert verdict(lower) == "lower"


def test_figures_json_is_plain_json_without_nan(tmp_path, generator):
    samples = {"exact_match": np.ones((5, 2)), "reward": generator.normal(size=(5, 2))}
    evaluation(tmp_path, {"base": rows_of({"nll": [1.0] * 5}, samples), "new": rows_of({"nll": [2.0] * 5}, samples)})

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "figures.json").read_text(), parse_constant=refuse)


@slow
def test_figures_of_3_models_on_2000_prompts_take_less_than_a_minute_of_one_core(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 4999)
    shares = ("exact_match", "ended", "reward_accuracy", "preference_accuracy", "preference_gap_accuracy")
    numbers = ("rouge_l", "edit_distance", "edit_similarity", "nll", "nll_per_token", "margin", "length", "repetition")
    sampled = ("exact_match", "ended", "rouge_l", "edit_similarity", "length", "reward")

    def model():
        figures = {name: generator.binomial(1, 0.4, 2000) for name in shares}
        figures |= {name: generator.gamma(2, size=2000) for name in [*numbers, "preference_margin"]}
        draws = {name: generator.binomial(1, 0.4, (2000, 4)) for name in sampled[:2]}
        draws |= {name: generator.gamma(2, size=(2000, 4)) for name in sampled[2:]}
        return rows_of(figures, draws, expert_tokens=-generator.gamma(1, size=(2000, 60)))

    models = {name: model() for name in ("a", "b", "c")}
    begun = time.process_time()
    own = evaluation(tmp_path, models, part=256)
    seconds = time.process_time() - begun
    print(f"{seconds:.1f} s of one core")
    assert len(own["differences"]["c"]) == 20 and seconds < 60
