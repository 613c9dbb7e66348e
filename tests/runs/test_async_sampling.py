"""Runs with ``async_sampling``: which policy answers, when, and what the run says of it. vLLM is a stand-in."""

import json
import re
import shutil
import types

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from irlfast.config import make_config
from irlfast.data.encoding import make_encoder
from irlfast.data.store import load_examples
from irlfast.engine.early import save_early
from irlfast.engine.plan import Plan
from irlfast.methods.stages import stage_examples
from irlfast.models.configs import embedding_rows
from irlfast.models.tokenizers import unused_ids
from irlfast.sampling.generation import read_samples
from irlfast.sampling.shards import Sampling, Shard, seed_of
from irlfast.sampling.vllm_sampler import generate_vllm
from tests.helpers.runs import DEMO, PYTHON, contents, run, run_killed_at
from tests.helpers.shards import claims
from tests.helpers.storm import differences, stand_in
from tests.helpers.tiers import full, slow
from tests.helpers.vllm_cases import VLLM_PYTHON, needs_vllm

KEYS = DEMO | {  # whose steps are slow enough for a kill between two of them
    "max_train_samples": 48,
    "max_eval_samples": 8,
    "max_new_tokens": 6,
    "sft_steps": 2,
    "inner_steps": 8,
    "use_vllm": True,
    "async_sampling": True,
    "async_sampling_at": 0.4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
}
EARLY, LAST = 3, 8  # steps of a stage
RFT = {
    "method": "rft",
    "align_rounds": 2,
    "num_generations": 2,
    "reward_steps": 2,
    "vllm_importance_sampling_correction": True,
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, python):
    output = tmp_path_factory.mktemp("async") / "run"
    return output, run(output, **KEYS, vllm_python=python)[1]


def config_of(output):
    return make_config(yaml.safe_load((output / "config.yaml").read_text()))


def examples_of(output, stage):
    return stage_examples(load_examples(output / "data/train.safetensors"), config_of(output), stage)


def drawn_by(policy, output, stage, more=(), n=1):
    """The answers that a policy draws to a stage's prompts by the seeds of the run, without the run."""
    config, examples = config_of(output), examples_of(output, stage)
    seed = (config.seed, stage, *more)
    seeds = [seed_of(seed, place) for place in range(len(examples))]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    ends = make_encoder(tokenizer, config).ends
    shard = Shard(0, [x.prompt_ids for x in examples], seeds, n, Sampling(1.0, 1.0, 0, seed), 6, ends)
    never = unused_ids(tokenizer, embedding_rows(config, policy))
    settings = {"python": config.vllm_python, "dtype": "float32", "max_model_len": 256, "never": never}
    [(_, answers)] = generate_vllm(policy, claims(shard), **settings)
    return [drawn.ids for drawn in answers]


def kept(folder):
    return [[*ids] for ids in read_samples(sorted(folder.glob("*.jsonl")))]


def phases(output):
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {row["phase"]: row for row in rows}


def token_logps(policy, prompt, answer):
    """Transformers' log-probability of each token of an answer."""
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor([*answer])[:, None])[:, 0]


def test_the_prompts_of_a_stage_are_answered_by_the_policy_at_the_declared_step_of_the_stage_before(whole):
    output, _ = whole
    samples = kept(output / "stage-01/samples")
    assert len(samples) == 24
    assert samples == drawn_by(output / "stage-00/early", output, 1)
    assert samples != drawn_by(output / "stage-00/policy", output, 1)
    assert kept(output / "stage-00/samples") == drawn_by(output / "sft/policy", output, 0)
    assert not (output / "stage-01/early").exists()  # no stage follows


def test_the_reference_is_the_policy_that_the_stage_starts_from_and_not_the_one_that_answered(whole):
    output, _ = whole
    scores = load_file(output / "stage-01/reference.safetensors")
    first = examples_of(output, 1)[0]
    found = scores["values"][: scores["lengths"][0]]
    torch.testing.assert_close(
        found, token_logps(output / "stage-00/policy", first.prompt_ids, first.answer_ids), rtol=0, atol=1e-4
    )
    early = token_logps(output / "stage-00/early", first.prompt_ids, first.answer_ids)
    assert (found - early).abs().max() > 0.01


def test_the_staleness_is_in_the_files_of_the_run(whole):
    output, _ = whole
    steps = {"sampled_after_step": EARLY, "steps": LAST, "staleness": LAST - EARLY}
    assert json.loads((output / "stage-00/staleness.json").read_text()) == steps
    for phase, stale in {"stage-00": 0, "stage-01": LAST - EARLY}.items():
        assert json.loads((output / phase / "pairs.json").read_text())["sampling/staleness"] == stale
        assert phases(output)[phase]["sampling/staleness"] == stale
    assert "sampling/staleness" not in phases(output)["sft"]
    assert "steps old" in (output / "report.html").read_text()


def seconds_of(said):
    """The seconds that the answers of stage 1 took beside training, and those that the stage waited for them."""
    [times] = re.findall(
        r"stage-01/samples: \d+ answers in ([\d.]+) s beside training, and ([\d.]+) s of waiting", said
    )
    return [*map(float, times)]


def test_answers_come_while_the_stage_before_trains(whole):
    """The next stage waits for a part of the time in which its answers are made, not for all of it."""
    took, waited = seconds_of(whole[1])
    assert waited < took


@full
@pytest.mark.parametrize(("steps", "same"), [(EARLY, "early"), pytest.param(LAST, "policy", marks=slow)])
def test_the_early_policy_is_that_of_a_stage_of_so_many_steps_and_saving_it_changes_no_step(
    whole, tmp_path, python, steps, same
):
    """A stage of as few steps, or of as many, without ``async_sampling`` ends with the same bytes."""
    alone = {"async_sampling": False, "async_sampling_at": 0.5, "inner_steps": steps}
    run(tmp_path / "run", **KEYS | alone, vllm_python=python)
    assert contents(tmp_path / "run/stage-00/policy") == contents(whole[0] / "stage-00" / same)
    assert not (tmp_path / "run/stage-00/early").exists()
    assert "sampling/staleness" not in phases(tmp_path / "run")["stage-01"]
    assert "steps old" not in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(["stage-00/checkpoint/step-2", "stage-00/early", "stage-00/checkpoint/step-6"], marks=full),
        pytest.param(["stage-01/samples"], marks=slow),
        pytest.param(["stage-00/staleness.json", "stage-01/pairs.json"], marks=slow),
    ],
    ids=lambda moments: moments[0],
)
def test_a_run_that_is_killed_ends_as_an_undisturbed_one(whole, tmp_path, python, moments):
    keys = {**KEYS, "vllm_python": python}
    run_killed_at(tmp_path / "run", moments, **keys)
    run(tmp_path / "run", **keys)
    assert differences(tmp_path / "run", whole[0]) == []


@pytest.mark.parametrize(
    ("lost", "moment"),
    [
        pytest.param("stage-00/early", "stage-00/checkpoint/step-6", marks=full),
        pytest.param("stage-01/samples", "stage-01/samples/00000.jsonl", marks=slow),
    ],
)
def test_a_lost_early_policy_or_its_lost_answers_are_made_again(whole, tmp_path, python, lost, moment):
    """The early policy is lost after a later checkpoint was written, from which no step could make it."""
    keys = {**KEYS, "vllm_python": python}
    run_killed_at(tmp_path / "run", [moment], **keys)
    shutil.rmtree(tmp_path / "run" / lost)
    run(tmp_path / "run", **keys)
    assert differences(tmp_path / "run", whole[0]) == []


@full
def test_rft_weights_stale_answers_by_the_policy_that_the_stage_starts_from(tmp_path, python):
    output = tmp_path / "run"
    run(output, **KEYS | RFT, vllm_python=python)
    answers = kept(output / "stage-01/round-00/rollouts")
    assert len(answers) == 24
    assert answers == drawn_by(output / "stage-00/early", output, 1, (1, 0), n=2)[:24]
    assert kept(output / "stage-01/samples") == drawn_by(output / "stage-00/early", output, 1)
    scores = load_file(output / "stage-01/round-00/old.safetensors")
    expected = token_logps(output / "stage-00/policy", examples_of(output, 1)[0].prompt_ids, answers[0])
    torch.testing.assert_close(scores["values"][: scores["lengths"][0]], expected, rtol=0, atol=1e-4)
    stale = {"stage-00/round-00": 0, "stage-00": 0, "stage-01/round-00": LAST - EARLY, "stage-01": 0}
    for phase, steps in stale.items():
        assert json.loads((output / phase / "round.json").read_text())["sampling/staleness"] == steps
    drawn = kept(output / "stage-01/reward/drawn")  # the reward is judged by the policy itself
    assert len(drawn) == 8


@full
def test_of_two_processes_the_first_has_vllm_answer(tmp_path, python):
    run(tmp_path / "run", 2, **KEYS, vllm_python=python)
    assert kept(tmp_path / "run/stage-01/samples") == drawn_by(tmp_path / "run/stage-00/early", tmp_path / "run", 1)


@full
@pytest.mark.parametrize(
    "keys", [{"method": "t_spin"}, pytest.param({"method": "spin"}, marks=slow)], ids=lambda keys: keys["method"]
)
def test_self_play_with_all_prompts_is_sampled_early_too_and_old_policies_are_deleted(tmp_path, python, keys):
    keys = {**KEYS, **keys, "stages": 3, "save_total_limit": 1}
    run(tmp_path / "run", **keys, vllm_python=python)
    assert phases(tmp_path / "run")["stage-02"]["sampling/staleness"] == LAST - EARLY
    assert [path.name for path in sorted((tmp_path / "run").glob("stage-*")) if (path / "early").exists()] == []


@full
def test_answers_that_vllm_cannot_draw_beside_training_are_drawn_by_the_early_policy_afterwards(tmp_path, python):
    """The stand-in refuses adapters, which are merged then; no model may be loaded beside training."""
    _, said = run(tmp_path / "run", **KEYS, use_peft=True, vllm_python=python)
    assert "stage-01/samples: sampling beside training ended (UnsupportedAdapter)" in said
    assert phases(tmp_path / "run")["stage-01"]["sampling/staleness"] == LAST - EARLY


def test_all_processes_wait_for_the_one_that_asks_and_not_in_the_collective_of_a_step(monkeypatch, tmp_path):
    """To ask servers, the main process first loads the policy, which may take longer than a collective may wait."""
    calls = []
    processes = types.SimpleNamespace(on_main=lambda *_: False, barrier=lambda: calls.append("meet"))
    monkeypatch.setattr("irlfast.engine.early.dist", processes)
    monkeypatch.setattr("irlfast.engine.early.save_model", lambda *_: calls.append("save"))
    run = types.SimpleNamespace(encoder=None, config=None, ask_early=lambda *_: calls.append("ask"))
    for step in (EARLY - 1, EARLY, EARLY + 1):
        save_early(run, tmp_path, None, "policy", Plan(0, [], 1e-3, "rmsprop", early=EARLY), step)
    assert calls == ["save", "meet", "ask", "meet"]


@slow
@needs_vllm
def test_the_real_vllm_answers_while_the_stage_before_trains(tmp_path):
    """The answers of stage 1 are those that the early policy draws alone."""
    output = tmp_path / "run"
    keys = {"eval_every_stage": False, "inner_steps": [200, 2], "async_sampling_at": 0.05, "learning_rate": 1e-4}
    _, said = run(output, PYTHON, **KEYS | keys, vllm_python=VLLM_PYTHON)
    took, waited = seconds_of(said)
    assert waited < took
    assert kept(output / "stage-01/samples") == drawn_by(output / "stage-00/early", output, 1)
    facts = json.loads((output / "stage-01/pairs.json").read_text())
    assert facts["sampling/staleness"] == 190
    assert facts["sampling/sampling_logp_difference/mean"] > 1e-3
    print(f"answers in {took:.1f} s beside training, and {waited:.1f} s of waiting")
