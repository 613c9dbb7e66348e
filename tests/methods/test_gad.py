"""GAD as a user runs it: a reward that learns in every round, prompts without answers, a backbone of its own."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from irlfast.reports.files import read_run, split_time
from tests.helpers.runs import contents, run, run_killed_at
from tests.helpers.tiers import full, one_run_or_each_its_own

ROUNDS = {
    "method": "gad",
    "stages": 1,
    "align_rounds": 2,
    "num_generations": 3,
    "reward_steps": 4,
    "reward_learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{hour} o'clock at night"}) + "\n" for hour in range(12)))
    keys = ROUNDS | {"prompt_dataset_name": prompts}
    return folder / "run", keys, *run(folder / "run", **keys)


def test_the_reward_learns_in_every_round_from_the_answers_that_it_then_judges(rounds):
    output, *_ = rounds
    stage = output / "stage-00"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows if row["step"] == 2] == [
        "sft",
        "stage-00/reward",
        "stage-00/round-00/reward",
        "stage-00/round-00",
        "stage-00/round-01/reward",
        "stage-00",
    ]
    for place, answers in (("round-00", "round-00/rollouts"), ("round-01", "rollouts")):
        counts = json.loads((stage / place / "pairs.json").read_text())
        drawn = [json.loads(line) for path in (stage / answers).glob("*.jsonl") for line in path.open()]
        shown = [row for row in drawn if "o'clock at night" not in row["prompt"]]
        assert len(drawn) - len(shown) == 6 * 3
        assert counts["pairs"] + counts["dropped_identical"] + counts["dropped_empty"] == len(shown) == 48 * 3
        assert counts["synthetic_tokens"] == sum(len(row["answer_ids"]) for row in shown)
    assert not (stage / "round-00" / "reward" / "model").exists()  # the next round's took its place
    first, last = (load_file(stage / name / "model/model.safetensors") for name in ("reward", "round-01/reward"))
    assert not [name for name in first if torch.equal(first[name], last[name])]
    assert json.loads((stage / "round-01/reward/eval.json").read_text())["reward_pairs"] > 0


def test_prompts_without_answers_are_answered_in_every_round_and_teach_no_reward(rounds):
    output, _, out, err = rounds
    samples = [json.loads(line) for path in (output / "stage-00/samples").glob("*.jsonl") for line in path.open()]
    assert len(samples) == 96
    assert not any("o'clock at night" in row["prompt"] for row in samples)
    assert "prompts without answers: 12 of 12 rows" in out + err
    assert json.loads((output / "data.json").read_text())["prompts"]["kept"] == 12
    for place in ("stage-00/round-00", "stage-00"):
        assert json.loads((output / place / "round.json").read_text())["answers"] == (48 + 6) * 3


def test_the_report_counts_the_sampling_of_a_round_once(rounds):
    output, *_ = rounds
    read = read_run(output)
    pairs, times = read.pairs, split_time(read)
    assert list(times)[1:] == [
        "stage-00/reward",
        "stage-00/round-00/reward",
        "stage-00/round-00",
        "stage-00/round-01/reward",
        "stage-00",
    ]
    assert times["stage-00/round-00/reward"][0] == pairs["stage-00/round-00"]["sample_seconds"]
    assert times["stage-00/round-00"][0] < 0.2 * times["stage-00/round-00/reward"][0]
    assert "Missing from these files" not in (output / "report.html").read_text()


MOMENTS = [
    "stage-00/round-00/rollouts/00000.jsonl",
    "stage-00/reward/model",
    "stage-00/round-00/reward/checkpoint/step-2",
    "stage-00/round-00/reward/DONE",
    "stage-00/round-00/DONE",
    "stage-00/round-01/reward/DONE",
]


@full
@pytest.mark.parametrize("moments", one_run_or_each_its_own(MOMENTS))
def test_a_run_that_is_killed_at_any_moment_resumes_to_the_same_bytes(rounds, tmp_path, moments):
    run_killed_at(tmp_path / "run", moments, **rounds[1])
    run(tmp_path / "run", **rounds[1])
    assert contents(tmp_path / "run" / "final") == contents(rounds[0] / "final")


@pytest.fixture(scope="module")
def backbone(rounds, tmp_path_factory):
    """A model that is deeper and wider than the policy, with the policy's tokenizer."""
    folder, policy = tmp_path_factory.mktemp("backbone") / "model", rounds[0] / "sft" / "policy"
    config = AutoConfig.from_pretrained(policy)
    config.num_hidden_layers, config.layer_types = config.num_hidden_layers + 1, None
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 2 * config.intermediate_size
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return folder


def test_a_reward_can_have_a_backbone_of_its_own_that_is_larger_than_the_policy(rounds, backbone, tmp_path):
    keys = {"align_rounds": 1, "reward_backbone": backbone, "reward_steps": 2, "inner_steps": 2, "sft_steps": 1}
    run(tmp_path / "run", **{**ROUNDS, **keys})
    given = load_file(backbone / "model.safetensors")
    for place in ("reward", "round-00/reward"):
        learned = load_file(tmp_path / "run" / "stage-00" / place / "model" / "model.safetensors")
        assert {name for name in learned if name not in given} == {"score.weight"}
        shared = [name for name in learned if name in given]
        assert not [name for name in shared if torch.equal(learned[name][: len(given[name])], given[name])]
    policy = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert policy["model.norm.weight"].shape == (given["model.norm.weight"].shape[0] // 2,)


def test_a_backbone_with_another_tokenizer_is_refused_before_anything_is_written(backbone, tmp_path):
    _, err = run(tmp_path / "run", code=2, **{**ROUNDS, "train_tokenizer": 290}, reward_backbone=backbone)
    assert f"reward_backbone {backbone}: found another tokenizer than the policy's; expected the same" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two rewards that learn apart, with a learned variance, and a function beside them: all on one scale.

    What is held out are preferences that no demonstration comes from.
    """
    folder = tmp_path_factory.mktemp("mixed")
    rows = [{"prompt": f"say {i}", "chosen": f"{i} it is", "rejected": f"never {i}"} for i in range(9)]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    function = "def variety(completion_ids, **columns):\n    return [len(set(ids)) for ids in completion_ids]\n"
    (folder / "own.py").write_text(function)
    keys = {
        **ROUNDS,
        "reward_loss": "gaussian",
        "reward_models": 2,
        "reward_heads": 2,
        "reward_steps": 2,
        "inner_steps": 2,
        "reward_normalize": True,
        "reward_function": f"{folder}/own.py:variety",
        "reward_weights": [1.0, 0.5],
        "eval_dataset_name": folder / "preferences.jsonl",
    }
    run(folder / "run", **keys)
    return folder / "run"


def test_rewards_that_learn_apart_differ_and_are_one_reward_of_all_of_their_heads(mixed):
    first, second = (
        load_file(mixed / "stage-00" / f"reward{name}" / "model/model.safetensors") for name in ("", "-01")
    )
    assert first["score.weight"].shape[0] == 4  # two heads, each with a mean and a log-variance
    assert all(not torch.equal(first[name], second[name]) for name in first)
    scores = [load_file(mixed / "stage-00" / f"reward-0{name}.safetensors")["values"] for name in ("", "-1")]
    assert [values.shape[1] for values in scores] == [2, 2]


def test_rewards_are_mixed_on_the_scale_of_the_answers_of_the_stages_first_round(mixed):
    def rewards(place: str) -> list[torch.Tensor]:
        names = ("reward-0", "reward-0-1", "reward-1")
        files = [load_file(mixed / place / f"{name}.safetensors")["values"].double() for name in names]
        return [torch.cat(files[:2], 1).mean(1), files[2].flatten()]

    scales = json.loads((mixed / "stage-00" / "reward_scales.json").read_text())
    for values, scale in zip(rewards("stage-00/round-00"), scales, strict=True):
        assert values.mean().item() == pytest.approx(scale["mean"], abs=1e-6)
        assert values.std().item() == pytest.approx(scale["std"], abs=1e-6)
    for place in ("stage-00/round-00", "stage-00"):
        learned, variety = (
            (values - scale["mean"]) / scale["std"] for values, scale in zip(rewards(place), scales, strict=True)
        )
        mean = json.loads((mixed / place / "round.json").read_text())["reward"]
        assert mean == pytest.approx((learned + 0.5 * variety).mean().item(), abs=1e-5)


def test_a_reward_is_measured_on_preferences_that_no_demonstration_comes_from(mixed):
    for place in ("stage-00/reward", "stage-00/round-01/reward"):
        metrics = json.loads((mixed / place / "eval.json").read_text())
        assert metrics["preference_pairs"] == 9
        assert 0 <= metrics["preference_accuracy"] <= 1
    assert "preference_gap" in json.loads((mixed / "sft" / "eval.json").read_text())
