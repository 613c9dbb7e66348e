"""RFT, AfD, reward models and best-of-N as a user runs them: files, metrics, a kill at any moment, each option."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from irlfast.config import make_config
from irlfast.data.encoding import make_encoder
from irlfast.data.sets import read_sets
from irlfast.data.store import load_examples
from irlfast.reports.files import read_run, split_time
from tests.helpers.runs import PYTHON, contents, printed, run, run_killed_at
from tests.helpers.tiers import first_then_full, full, one_run_or_each_its_own

RFT = {"method": "rft", "stages": 1, "align_rounds": 2, "num_generations": 3, "reward_learning_rate": 1e-3}
PREFERENCES = [
    {"prompt": f"say {word}", "chosen": f"{word} it is, {i}", "rejected": f"never {i}"}
    for i in range(20)
    for word in ("yes", "no", "maybe")
]


@pytest.fixture(scope="module")
def rft(tmp_path_factory):
    output = tmp_path_factory.mktemp("rft") / "run"
    return output, *run(output, **RFT)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """One row of them is a demonstration alone, as a few of every real set."""
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    rows = [*PREFERENCES, {"prompt": "say so", "chosen": "so it is"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_files_and_metrics_of_a_run(rft):
    output, out, err = rft
    stage = output / "stage-00"
    for name in ("reward/model", "reward/leaks.json", "reward/eval.json", "round-00/round.json", "round.json", "DONE"):
        assert (stage / name).exists(), name
    assert not (stage / "round-00" / "policy").exists()  # the next round's took its place
    assert not list(output.rglob("*.tmp"))
    assert "stage-00" in out
    assert "tells expert from synthetic, alone" in err
    assert "stage-00/reward: held-out reward accuracy" in err
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows if row["step"] == 2] == [
        "sft",
        "stage-00/reward",
        "stage-00/round-00",
        "stage-00",
    ]
    assert {"rewards/accuracies", "rewards/margins"} <= set(rows[3])
    report = (output / "report.html").read_text()
    assert "00/reward" in report
    assert "Sampler and trainer" in report
    for phase in ("stage-00/round-00", "stage-00"):
        kept = json.loads((output / phase / "round.json").read_text())
        known = {name: value for name, value in kept.items() if name.startswith("sampling/")}
        assert 0 < known["sampling/sampling_logp_difference/max"] < 1e-4  # both by Transformers, in fp32
        assert known["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
        assert all(known.items() <= row.items() for row in rows if row["phase"] == phase)
        assert f"{phase}: log-probabilities of tokens differ between sampler and trainer" in err
    assert not any("sampling/" in name for row in rows for name in row if row["phase"] in ("sft", "stage-00/reward"))
    read = read_run(output)
    rounds, times = read.rounds, split_time(read)
    assert times["stage-00/reward"][0] == read.pairs["stage-00"]["sample_seconds"] > 0
    for phase in ("stage-00/round-00", "stage-00"):
        assert times[phase][:2] == [rounds[phase]["sample_seconds"], rounds[phase]["score_seconds"]]
        assert min(times[phase][:-3]) > 0  # one process need not communicate, nor a short phase write a checkpoint


def test_rewards_and_advantages_of_a_round_are_those_of_its_rollouts(rft):
    output, *_ = rft
    metrics = json.loads((output / "stage-00" / "round.json").read_text())
    rewards = load_file(output / "stage-00" / "reward-0.safetensors")["values"]
    rows = [json.loads(line) for path in (output / "stage-00" / "rollouts").glob("*.jsonl") for line in path.open()]
    assert metrics["answers"] == len(rows) == len(rewards) == 48 * 3  # half of 96 prompts, three answers each
    assert metrics["reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)


MOMENTS = [
    "stage-00/samples/00000.jsonl",
    "stage-00/reward/checkpoint/step-2",
    "stage-00/reward/model",
    "stage-00/round-00/DONE",
    "stage-00/rollouts/00000.jsonl",
    "stage-00/checkpoint/step-2",
]


@full
@pytest.mark.parametrize("moments", one_run_or_each_its_own(MOMENTS))
def test_a_run_that_is_killed_at_any_moment_resumes_to_the_same_bytes(rft, tmp_path, moments):
    run_killed_at(tmp_path / "run", moments, **RFT)
    run(tmp_path / "run", **RFT)
    assert contents(tmp_path / "run" / "final") == contents(rft[0] / "final")


OPTIONS = {
    "afd-gail-token-ppo": {
        "method": "afd",
        "divergence": "gail",
        "reward_level": "token",
        "reward_credit": "token",
        "gamma": 0.9,
        "align": "ppo",
    },
    "afd-alpha-apa-lora": {
        "method": "afd",
        "reward_loss": "alpha",
        "align": "apa",
        "use_peft": True,
        "reward_heads": 2,
        "reward_combine": "min",
    },
    "linear-bon-frozen": {"align": "bon", "reward_loss": "linear", "reward_frozen_layers": 1},
    "init_sft-whitened-no-kl": {
        "reward_data": "init_sft",
        "whiten_rewards": True,
        "missing_eos_penalty": 1.0,
        "kl_in": "none",
    },
    "sft_demo-shorter": {
        "reward_data": "sft_demo",
        "length_penalty": 0.01,
        "stages": 2,
        "kl_in": "reward",
        "reference": "initial",
    },
    "grpo-weighted": {
        "align": "grpo",
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
    },
}


@pytest.mark.parametrize("name", first_then_full(OPTIONS, others=2))
def test_alignment_with_each_option_changes_every_tensor_that_is_trained(tmp_path, name):
    run(tmp_path / "run", **{**RFT, "align_rounds": 1, **OPTIONS[name]})
    last = f"stage-0{OPTIONS[name].get('stages', RFT['stages']) - 1}"
    kind = "adapter_model" if OPTIONS[name].get("use_peft") else "model"
    before, after = (load_file(tmp_path / "run" / phase / "policy" / f"{kind}.safetensors") for phase in ("sft", last))
    assert not [key for key in before if torch.equal(before[key], after[key])]
    assert all(after[key].isfinite().all() for key in after)


@full
def test_a_higher_beta_holds_the_policy_nearer_to_the_reference_in_a_stage_of_one_round(tmp_path):
    """The policy that samples is the reference there, so that the KL of its answers is 0 before the first step."""
    distances = []
    for beta in (0.1, 10.0, 1000.0):
        output = tmp_path / str(beta)
        run(output, **{**RFT, "align_rounds": 1}, beta=beta)
        before, after = (load_file(output / name / "model.safetensors") for name in ("sft/policy", "final"))
        distances.append(sum((before[name] - after[name]).square().sum() for name in before) ** 0.5)
    assert distances[0] > distances[1] > distances[2] > 0


@full
def test_with_every_layer_frozen_the_reward_is_a_head_on_the_policys_backbone(tmp_path):
    run(tmp_path, **RFT | {"method": "reward", "reward_frozen_layers": 2, "logging_steps": 1})
    policy, reward = (load_file(tmp_path / name / "model.safetensors") for name in ("sft/policy", "final"))
    assert {name for name in reward if name not in policy} == {"score.weight"}
    rows = {name: len(policy[name]) for name in reward if name in policy}  # one more in the embedding, for padding
    assert all(torch.equal(reward[name][:count], policy[name]) for name, count in rows.items())
    rows = map(json.loads, (tmp_path / "metrics.jsonl").open())
    assert all(row["grad_norm"] > 0 for row in rows if row["phase"] == "stage-00/reward")


def test_a_reward_model_loads_with_plain_transformers_and_scores_as_it_was_trained(tmp_path, preferences):
    """Batch of padded texts, end token included, through ``AutoModelForSequenceClassification``."""
    output = tmp_path / "run"
    keys = {"dataset_name": preferences, "eval_dataset_name": "null", "reward_learning_rate": 1e-2}
    run(output, method="reward", reward_data="preference", stages=1, sft_steps=2, reward_steps=30, **keys)
    model = AutoModelForSequenceClassification.from_pretrained(output / "final")
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    metrics = json.loads((output / "stage-00" / "reward" / "eval.json").read_text())
    assert metrics["preference_accuracy"] == 1.0  # "never" is easy to tell
    config = make_config(yaml.safe_load((output / "config.yaml").read_text()))
    encoder = make_encoder(AutoTokenizer.from_pretrained(output / "sft" / "policy"), config)
    examples = read_sets(config, encoder).held_out
    ids = [
        [*example.prompt_ids, *answer] for example in examples for answer in (example.answer_ids, example.rejected_ids)
    ]
    with torch.no_grad():
        scores = model(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits[:, 0]
    ours = load_file(output / "stage-00" / "reward" / "rejected" / "reward.safetensors")["values"][:, 0]
    torch.testing.assert_close(scores, ours, rtol=1e-4, atol=1e-4)


def test_dpo_learns_from_chosen_and_rejected(tmp_path, preferences):
    keys = {"dataset_name": preferences, "eval_dataset_name": "null", "learning_rate": 1e-3, "sft_steps": 2}
    _, err = run(tmp_path / "run", method="dpo", stages=1, inner_steps=12, **keys)
    assert re.search(r"1 of \d+ rows have no rejected answer to the prompt: left out", err)
    sft, dpo = (json.loads((tmp_path / "run" / phase / "eval.json").read_text()) for phase in ("sft", "stage-00"))
    assert dpo["preference_accuracy"] == 1.0
    assert dpo["preference_gap"] > sft["preference_gap"] + 1
    assert not (tmp_path / "run" / "stage-00" / "samples").exists()


def test_a_method_that_needs_rejected_answers_is_refused_without_them(tmp_path):
    _, err = run(tmp_path / "run", code=2, method="dpo", stages=1)
    assert "found no row with a rejected answer to the prompt" in err
    assert "Traceback" not in err


# ---------------------------------------------------------------- best of N


def bon(output, how=1, **keys) -> str:
    pairs = {"num_generations": 6, "max_train_samples": 20, "max_prompt_length": 64, "max_length": 96, **keys}
    arguments = [f"{name}={value}" for name, value in {**pairs, "max_new_tokens": 12, "output_dir": output}.items()]
    return printed(["-m", "irlfast.bon", *arguments], how)[0]


@pytest.mark.parametrize("kind", first_then_full(["explicit", "implicit", "likelihood"], others=1))
def test_best_of_n_chooses_the_highest_reward_and_resumes(rft, tmp_path, kind):
    folder, output = rft[0], tmp_path / "bon"
    policy = folder / "sft" / "policy"
    rewards = {
        "explicit": {"reward_model_name_or_path": folder / "stage-00/reward/model"},
        "implicit": {"implicit_reward_policy": folder / "final", "implicit_reward_reference": policy},
        "likelihood": {"implicit_reward_policy": policy},
    }
    keys = rewards[kind] | {"model_name_or_path": policy, "dataset_name": "irlfast/demo/test.jsonl"}
    shown = bon(output, PYTHON if kind == "explicit" else 1, **keys)
    assert "best of" in shown
    best = [json.loads(line) for line in (output / "best.jsonl").open()]
    rewards = load_file(output / "part-00000" / "scores.safetensors")["rewards"]
    assert rewards.shape == (20, 6)
    assert [row["reward"] for row in best] == pytest.approx(rewards.amax(1).tolist(), rel=1e-5)
    rollouts = [
        json.loads(line) for path in (output / "part-00000" / "rollouts").glob("*.jsonl") for line in path.open()
    ]
    drawn = {(row["index"] // 6, tuple(row["answer_ids"])) for row in rollouts}
    assert all((i, tuple(row["answer_ids"])) in drawn for i, row in enumerate(best))
    curve = json.loads((output / "curve.json").read_text())
    assert [row["n"] for row in curve] == [1, 2, 4, 6]
    assert curve[0]["reward"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert curve[-1]["reward"] == pytest.approx(rewards.amax(1).mean().item(), abs=1e-5)
    before = (output / "best.jsonl").read_bytes()
    (output / "best.jsonl").unlink()
    (output / "part-00000" / "best.jsonl").unlink()
    bon(output, **keys)
    assert (output / "best.jsonl").read_bytes() == before


@full
def test_a_folder_with_a_comma_in_its_name_is_a_reward_model_and_not_two_policies(rft, tmp_path):
    folder = tmp_path / "reward, mine"
    shutil.copytree(rft[0] / "stage-00" / "reward" / "model", folder)
    keys = {"model_name_or_path": rft[0] / "final", "reward_model_name_or_path": folder, "max_train_samples": 4}
    bon(tmp_path / "bon", **keys, dataset_name="irlfast/demo/test.jsonl", num_generations=2)
    assert len((tmp_path / "bon" / "best.jsonl").read_text().splitlines()) == 4


@full
def test_two_processes_under_zero_3_end_with_the_parameters_of_one(rft, tmp_path):
    """The same global batches of pairs and of prompts; the reward's heads are gathered as an LM head is."""
    run(tmp_path / "two", 2, **RFT, zero_stage=3)
    for part in ("stage-00/reward/model", "final"):
        one, two = (load_file(folder / part / "model.safetensors") for folder in (rft[0], tmp_path / "two"))
        first = load_file(rft[0] / "sft" / "policy" / "model.safetensors")
        assert one.keys() == two.keys()
        for name in one:  # by norm: where a gradient is next to nothing, the sign of a step of RMSprop is rounding
            moved = (
                one[name][: len(first[name])] - first[name] if name in first else one[name]
            )  # a padding row was added
            assert (two[name] - one[name]).norm() < 1e-2 * moved.norm()


@full
def test_an_implicit_reward_is_beta_times_the_difference_of_two_likelihoods(rft, tmp_path):
    final, policy = rft[0] / "final", rft[0] / "sft" / "policy"
    found = {}
    ensemble = {"reward_combine": "mean_std", "reward_std_weight": 2.0}
    cases = {"both": final, "final": final, "policy": policy, "ensemble": f"[{final}, {policy}]"}
    for name, implicit in cases.items():
        keys = {"model_name_or_path": policy, "implicit_reward_policy": implicit, "max_train_samples": 8, "beta": 0.5}
        keys |= {"implicit_reward_reference": policy} if name == "both" else {}
        keys |= ensemble if name == "ensemble" else {}
        bon(tmp_path / name, **keys, dataset_name="irlfast/demo/test.jsonl", num_generations=3)
        found[name] = load_file(tmp_path / name / "part-00000" / "scores.safetensors")["rewards"]
    torch.testing.assert_close(found["both"], found["final"] - found["policy"], rtol=1e-4, atol=1e-4)
    assert (found["policy"] < 0).all()
    assert found["both"].abs().max() > 1e-4
    members = torch.stack([found["final"], found["policy"]])
    torch.testing.assert_close(found["ensemble"], members.mean(0) - 2 * members.std(0), rtol=1e-4, atol=1e-4)


@full
def test_many_answers_to_a_prompt_are_scored_as_each_alone(rft, tmp_path):
    policy, output, n = rft[0] / "final", tmp_path / "bon", 19
    keys = {"model_name_or_path": policy, "implicit_reward_policy": policy, "max_train_samples": 2, "beta": 1}
    bon(output, **keys, dataset_name="irlfast/demo/test.jsonl", num_generations=n)
    found = load_file(output / "part-00000" / "scores.safetensors")["rewards"].flatten()
    examples = load_examples(output / "data" / "train.safetensors")
    rows = [json.loads(line) for path in (output / "part-00000" / "rollouts").glob("*.jsonl") for line in path.open()]
    assert len(rows) == len(found) == 2 * n
    model = AutoModelForCausalLM.from_pretrained(policy)
    for row in rows:
        prompt, answer = examples[row["index"] // n].prompt_ids.tolist(), row["answer_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        picked = logps[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
        assert found[row["index"]].item() == pytest.approx(picked.sum().item(), abs=1e-4)


@full
def test_an_implicit_reward_with_another_tokenizer_is_refused(rft, tmp_path):
    run(tmp_path / "other", method="sft", train_tokenizer=290, sft_steps=1, inner_steps="null")
    keys = {"implicit_reward_policy": tmp_path / "other" / "final", "reward_data": "none"}
    _, err = run(tmp_path / "run", code=2, **{**RFT, **keys})
    assert "found another tokenizer than the policy's" in err
    assert "Traceback" not in err


@full
def test_a_learned_reward_and_an_added_one_are_summed_by_their_weights(rft, tmp_path):
    added = rft[0] / "stage-00" / "reward" / "model"
    keys = {"reward_model_name_or_path": added, "reward_weights": [1.0, 0.5], "align_rounds": 1}
    run(tmp_path / "run", **{**RFT, **keys})
    stage = tmp_path / "run" / "stage-00"
    learned, other = (load_file(stage / f"reward-{i}.safetensors")["values"].mean().item() for i in (0, 1))
    assert json.loads((stage / "round.json").read_text())["reward"] == pytest.approx(learned + 0.5 * other, abs=1e-6)
    _, err = run(tmp_path / "other", code=2, **{**RFT, **keys, "reward_weights": [1.0]})
    assert "reward_weights: found 1, expected 2" in err
