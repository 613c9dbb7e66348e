"""A checkpoint that one number of processes writes is resumed by another, and the losses go on."""

import itertools
import json
import types

import numpy as np
import pytest
import torch

from irlfast.common.artefacts import keep_staged
from irlfast.common.files import InputError, write_json
from irlfast.common.tensors import save_tensors
from irlfast.engine.checkpoint import resume
from irlfast.engine.plan import Plan
from irlfast.engine.state import load_state
from tests.helpers.resized_steps import STEPS
from tests.helpers.runs import printed
from tests.helpers.tiers import full, slow

EVERY = itertools.product("0123", ("float32", "bfloat16"), ("rmsprop", "adamw_torch"))
ENGINES = [" ".join(case) for case in EVERY if case[:2] != ("0", "bfloat16")]  # which is refused
KINDS = ("full policy", "lora reward", "offload policy")
SHORT = ["1 float32 adamw_torch full policy", "2 bfloat16 rmsprop full policy", "3 float32 rmsprop lora reward"]
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def losses(folder, counts, cases):
    """Return each case's losses, rates and mean after as many turns as ``counts`` has numbers of processes."""
    turns = []
    for number, count in enumerate(counts):
        first, last = (STEPS * each // len(counts) for each in (number, number + 1))
        out, _ = printed(["-m", "tests.helpers.resized_steps", str(folder), str(first), str(last), *cases], count)
        turns.append(json.loads(out.splitlines()[-1]))
    assert all(turn[case]["same"] for turn in turns for case in cases)
    return {case: ([row for turn in turns for row in turn[case]["steps"]], turns[-1][case]["mean"]) for case in cases}


def compare(folder, cases):
    """Compare three turns by 2, 1 and 4 processes with one turn of two."""
    expected, resized = losses(folder / "one", [2], cases), losses(folder / "three", [2, 1, 4], cases)
    for case in cases:
        (steps, mean), (own, own_mean) = expected[case], resized[case]
        gap = max(abs(a - b) for (a, _), (b, _) in zip(steps, own, strict=True))
        print(f"{case}: {gap:.1e}")
        assert [rate for _, rate in own] == [rate for _, rate in steps], case
        assert gap < TOLERANCE[case.split()[1]], case
        assert own_mean == pytest.approx(mean, abs=TOLERANCE[case.split()[1]]), case


def progress_at(folder, **progress):
    staged = folder / "step-3.tmp"
    staged.mkdir(parents=True)
    write_json(staged / "progress.json", {"step": 3, "processes": 2} | progress)
    keep_staged(staged, folder / "step-3")


def test_steps_of_another_size_are_refused_and_the_checkpoint_stays(tmp_path):
    progress_at(tmp_path / "sft/checkpoint", step_size=16)
    plan = Plan(None, [np.arange(8)], 1e-3, "rmsprop")
    with pytest.raises(InputError, match="sft: found a checkpoint of steps of 16 prompts and a plan of 8 per step"):
        resume(None, tmp_path / "sft/checkpoint", plan)
    assert (tmp_path / "sft/checkpoint/step-3/progress.json").exists()


def test_a_checkpoint_of_other_parameters_is_refused_and_stays(tmp_path):
    model = torch.nn.Linear(3, 2)
    engine = types.SimpleNamespace(module=types.SimpleNamespace(model=model))
    with pytest.raises(InputError, match="found 0 values of bias, expected 2; continue with the version"):
        load_state(engine, tmp_path)  # a folder of an earlier version of irlfast
    save_tensors(
        {"0/weights/bias": torch.ones(2), "0/weights/weight": torch.ones(5)}, tmp_path / "state-0-0.safetensors"
    )
    with pytest.raises(InputError, match="found 5 values of weight, expected 6"):
        load_state(engine, tmp_path)
    assert (tmp_path / "state-0-0.safetensors").exists()


@full
def test_losses_go_on_from_two_processes_to_one_and_to_four(tmp_path):
    compare(tmp_path, SHORT)


@slow
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_go_on_with_every_stage_dtype_and_optimiser(tmp_path, engine):
    compare(tmp_path, [f"{engine} {kind}" for kind in KINDS])


@slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_number_of_processes_goes_on_with_the_same_bits(tmp_path, engine):
    cases = [f"{engine} {kind}" for kind in KINDS]
    assert losses(tmp_path / "one", [2], cases) == losses(tmp_path / "three", [2, 2, 2], cases)
