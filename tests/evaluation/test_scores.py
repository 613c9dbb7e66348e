"""Reward models, implicit rewards and users' functions score the answers of an evaluation as they score alone."""

import datetime
import json
from pathlib import Path

import pytest

from irlfast.common.files import read_json
from irlfast.config import Config
from irlfast.data.rows import Demonstration
from irlfast.sampling.reward_external import load_external
from tests.helpers.runs import DEMO, ROOT, printed, run
from tests.helpers.tokenizers_like import qwen
from tests.sampling.test_external_rewards import save_reward

FUNCTIONS = """
def reward(completions, **columns):
    return [float(len(text)) for text in completions]

def grade(prompt, answer, expert, row):
    assert row["prompt"] == prompt and row["completion"].strip() == expert
    return {"same_start": answer[:1] == expert[:1], "digits": sum(map(str.isdigit, answer)) or None}
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """An evaluation of two policies of the demo's model, scored in every way; its folder, and the scorers' names."""
    folder = tmp_path_factory.mktemp("scored")
    golden, _ = save_reward(folder / "golden", qwen())
    trained = folder / "run"
    run(trained, **DEMO)
    (folder / "functions.py").write_text(FUNCTIONS)
    names = {
        "reward_model_name_or_path": golden,
        "implicit_reward_policy": str(trained / "final"),
        "implicit_reward_reference": str(trained / "sft/policy"),
        "reward_function": f"{folder}/functions.py:reward",
        "scorer": f"{folder}/functions.py:grade",
    }
    keys = names | {"max_eval_samples": 5, "num_generations": 2, "output_dir": folder / "out", "beta": 0.5}
    models = [str(trained / "sft/policy"), str(trained / "final")]
    dataset = str(ROOT / "irlfast/demo/test.jsonl")
    pairs = [f"{name}={value}" for name, value in keys.items()]
    printed(["-m", "irlfast.evaluate", *models, "--dataset", dataset, *pairs])
    return folder / "out", names


def rows_of(output: Path, name: str) -> list[tuple[dict, dict]]:
    """Pairs of a prompt with its texts and a model's row."""
    prompts = [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]
    [part] = (output / "models").glob(f"*/{name}/part-*.jsonl")
    return list(zip(prompts, map(json.loads, part.read_text().splitlines()), strict=True))


def test_a_reward_model_judges_answers_and_counts_from_the_demonstration(scored):
    """It is AfD's golden reward. The reward model reads the conversation in its own template."""
    output, names = scored
    golden = names["reward_model_name_or_path"]
    score = load_external(golden, Config(dataset_name="any"), datetime.datetime(2026, 1, 1))
    for given, row in rows_of(output, "final"):
        texts = [given["expert"], row["answer"], *row["samples"]]
        asked = [{"role": "user", "content": given["prompt"]}]
        zero, greedy, *others = score(
            [Demonstration(asked, {"role": "assistant", "content": text}) for text in texts]
        ).tolist()
        assert row["figures"][f"reward/{golden}"] == pytest.approx(greedy - zero, abs=1e-4)
        assert row["sample_figures"][f"reward/{golden}"] == pytest.approx([x - zero for x in others], abs=1e-4)


def test_the_implicit_reward_is_beta_times_the_log_ratio_less_that_of_the_demonstration(scored):
    """The policy and the reference of the reward are the two models, whose log-ratios the rows have."""
    output, names = scored
    key = f"reward/implicit {names['implicit_reward_policy']}"
    for (_, base), (_, row) in zip(rows_of(output, "sft"), rows_of(output, "final"), strict=True):
        of_demonstration = base["figures"]["nll"] - row["figures"]["nll"]
        expected = [0.5 * (ratio - of_demonstration) for ratio in row["sample_figures"]["kl"]]
        assert row["sample_figures"][key] == pytest.approx(expected, abs=1e-4)


def test_functions_score_every_answer(scored):
    output, names = scored
    for given, row in rows_of(output, "final"):
        length = row["figures"][f"reward/{names['reward_function']}"]
        assert length == pytest.approx(len(row["answer"]) - len(given["expert"]), abs=2)  # white space around texts
        answers = [row["answer"], *row["samples"]]
        same = [float(answer[:1] == given["expert"][:1]) for answer in answers]
        digits = [sum(map(str.isdigit, answer)) or None for answer in answers]
        assert [row["figures"]["same_start"], *row["sample_figures"]["same_start"]] == same
        assert [row["figures"].get("digits"), *row["sample_figures"].get("digits", [None] * 2)] == digits


def test_figures_json_has_the_scores_with_intervals_and_the_best_of_n_by_each_reward(scored):
    output, names = scored
    figures = read_json(output / "figures.json")
    [base, new] = figures["models"]
    key = f"reward/{names['reward_model_name_or_path']}"
    values = [row["figures"][key] for _, row in rows_of(output, "final")]
    assert figures["models"][new][key]["mean"] == pytest.approx(sum(values) / 5)
    assert {key, f"sampled_{key}", "same_start", "sampled_same_start"} <= figures["differences"][new].keys()
    assert {point["n"] for point in figures["curves"][base]["best_of"][key]} == {1, 2}
    assert "same_start" in figures["curves"][base]["pass"]


@pytest.mark.parametrize(
    "keys, message",
    [
        (["scorer=nowhere:f"], "scorer nowhere:f: cannot be imported"),
        (
            ["implicit_reward_policy=initial"],
            "found 'initial', a policy of a run itself",
        ),
        (["reward_model_name_or_path=no/where"], "reward model no/where: cannot be loaded"),
    ],
)
def test_a_scorer_that_cannot_score_is_refused_before_anything_is_measured(finished, tmp_path, keys, message):
    dataset = str(ROOT / "irlfast/demo/test.jsonl")
    start = ["-m", "irlfast.evaluate", str(finished[0] / "final"), "--dataset", dataset]
    _, err = printed([*start, f"output_dir={tmp_path / 'out'}", *keys], code=2)
    assert message in err and not (tmp_path / "out" / "models").exists()
