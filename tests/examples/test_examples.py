"""The programs of examples/ run, and the IRFT loop makes the trainer's own first step."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from irlfast.data.store import load_examples
from irlfast.sampling.generation import read_samples
from tests.helpers.runs import ROOT, printed, run
from tests.helpers.tiers import full

EXAMPLES = ROOT / "examples"


def program(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loops_first_step_is_the_trainers(tmp_path):
    """Same policy, same sampled answers: one step of the loop gives the loss, the margin and the weights of a run."""
    settings = {"learning_rate": 1e-4, "beta": 0.5, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    sizes = {
        "prompts_per_stage": "all",
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "global_batch_size": 16,
    }
    run(tmp_path, sft_steps=0, stages=1, inner_steps=1, logging_steps=1, save_steps=1, **settings, **sizes)
    demonstrations = load_examples(tmp_path / "data/train.safetensors")
    answers = read_samples([tmp_path / "stage-00/samples/00000.jsonl"])
    pairs = [
        ([*example.prompt_ids], [*example.answer_ids], [*answer])
        for example, answer in zip(demonstrations, answers, strict=True)
    ]
    loop = program("irft_loop")
    policy, reference = (AutoModelForCausalLM.from_pretrained(tmp_path / "initial/policy") for _ in range(2))
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-4)
    loss, margin = loop.irft_step(policy, reference, optimizer, pairs, beta=0.5)

    [row] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert loss == pytest.approx(row["loss"], rel=1e-6)
    assert 0.5 * margin == pytest.approx(row["rewards/margins"], abs=1e-5)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("initial/policy", "final"))
    weights = dict(policy.named_parameters())
    for name, trained in after.items():  # RMSprop's first step is nearly the gradient's sign, which rounding can turn
        assert (weights[name] - trained).norm() < 1e-3 * (trained - before[name]).norm(), name


def test_the_whole_loop_runs(capsys):
    program("irft_loop").main(sft_steps=2, stages=2, rows=128, held_out=4)
    assert "exact match after IRFT" in capsys.readouterr().out


def figures(folder: str, **options) -> dict:
    """The losses of the Transformers example over five steps on 8 pairs each, and the sum of its trained weights."""
    sgd = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_steps": 5, "logging_steps": 1}
    trainer = program("transformers_trainer").train(folder, **sgd | options)
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    weights = sum(parameter.double().sum().item() for parameter in trainer.model.policy.parameters())
    return {"process": trainer.args.process_index, "losses": losses, "weights": weights}


def test_transformers_trainer_learns_to_prefer_the_chosen_answers(tmp_path):
    log = program("transformers_trainer").train(str(tmp_path)).state.log_history
    losses = [row["loss"] for row in log if "loss" in row]
    assert float(losses[0]) < 0.694 and float(losses[-1]) < 0.9 * float(losses[0])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1e-6),
        ({"bf16": True}, 2e-4),
    ],
    ids=["accumulated gradients", "bf16"],
)
def test_transformers_trainer_takes_the_same_steps(tmp_path, options, error):
    expected, result = figures(str(tmp_path)), figures(str(tmp_path), **options)
    assert result["losses"] == pytest.approx(expected["losses"], rel=error)
    assert result["weights"] == pytest.approx(expected["weights"], rel=error)
    assert len(set(expected["losses"])) == 5


@full
def test_transformers_trainer_takes_the_same_steps_in_two_processes(tmp_path):
    out, _ = printed(["-m", "tests.helpers.two_trainers", str(tmp_path)], 2)
    expected, result = figures(str(tmp_path)), json.loads(out.splitlines()[-1])
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert result["weights"] == pytest.approx(expected["weights"], rel=1e-6)


def test_a_run_takes_ones_own_reward(tmp_path):
    reward = program("own_reward").canonical
    assert reward(prompts=[], completions=["12:30", " 2024-01-31", "99 min", "noon"], completion_ids=[]) == [1, 1, 1, 0]
    name = f"{EXAMPLES / 'own_reward.py'}:canonical"
    run(tmp_path, method="rft", reward_data="none", reward_function=name, stages=1, inner_steps=1)
    [values] = [json.loads(path.read_text()) for path in Path(tmp_path).rglob("round.json")]
    assert 0 <= values["reward"] <= 1
