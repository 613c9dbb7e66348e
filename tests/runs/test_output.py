"""The folder of a run: which changes of the configuration it takes, which it refuses, and one run at a time."""

import copy
import os
import random
import signal
import subprocess
import sys

import pytest
import yaml

from irlfast.common.files import InputError
from irlfast.config import dump, make_config
from irlfast.config.checks import PER_STAGE
from irlfast.runs.output import LOCKS, MAY_CHANGE, check_output, differences, lock
from tests.helpers.runs import ROOT, contents, run
from tests.helpers.tiers import full

OTHER = {"logging_steps": 20, "save_steps": 300, "report_to": ["wandb"], "vllm_python": "python", "run_name": "a"}


def resolved(**keys) -> dict:
    given = {"dataset_name": __file__, "model_name_or_path": ".", "prompts_per_stage": "all"}
    return yaml.safe_load(dump(make_config(given | keys)))


@pytest.mark.parametrize("seed", range(20))
def test_a_run_continues_if_nothing_that_it_learned_changes_and_is_refused_otherwise(seed):
    """Random draws: a schedule, then keys that may change and more stages, then one key that may not."""
    draw = random.Random(seed)
    stages, more = draw.randint(1, 4), draw.randint(0, 3)
    old, new = resolved(stages=stages), resolved(stages=stages + more)
    for name in draw.sample(PER_STAGE, 3):
        values = [draw.choice([0.5, 1.0, 2.0]) for _ in range(stages)]
        old[name] = values if draw.random() < 0.7 else values[0]
        started = old[name] if isinstance(old[name], list) else [old[name]] * stages
        new[name] = started + [draw.choice([0.5, 3.0]) for _ in range(more)]
    for name in draw.sample([*OTHER], 3):
        new[name] = OTHER[name]
    harmful, harmless = differences(old, new)
    assert not harmful
    changed = {name for name in old if old[name] != new[name]}
    assert {text.partition(":")[0] for text in harmless} == changed
    for harm in ("seed", "max_length", "temperature", "stages", "method"):
        worse = copy.deepcopy(new)
        if harm == "temperature":
            worse[harm] = [9.0] * worse["stages"]
        else:
            worse[harm] = {"seed": 7, "max_length": 77, "stages": stages - 1, "method": "sft"}[harm]
        assert [text.partition(":")[0] for text in differences(old, worse)[0]][:1] != []
        assert any(text.startswith(f"{harm}: {old[harm]!r} -> ") for text in differences(old, worse)[0])


def test_a_run_of_earlier_spellings_is_another_configuration(tmp_path):
    config = make_config({"dataset_name": __file__, "model_name_or_path": ".", "output_dir": str(tmp_path)})
    earlier = yaml.safe_load(dump(config)) | {"divergence": "reverse_kl", "reward_loss": "sigmoid", "learn_turns": None}
    del earlier["use_vllm"], earlier["implicit_reward_policy"], earlier["implicit_reward_reference"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(earlier | {"sampler": "transformers"}))
    with pytest.raises(InputError, match=r"its run has another configuration .*divergence: 'reverse_kl' -> 'airl'"):
        check_output(tmp_path, config)


def test_more_stages_of_split_prompts_are_refused_with_the_reason():
    [refused], _ = differences(
        resolved(stages=2, prompts_per_stage="split"), resolved(stages=3, prompts_per_stage="split")
    )
    assert refused == "stages: 2 -> 3, and with prompts_per_stage: split more stages change the prompts of each"


def test_another_logging_interval_is_refused_where_it_decides_when_a_stage_ends():
    old, new = (resolved(max_expert_drop=1.0, logging_steps=steps) for steps in (10, 20))
    assert differences(old, new)[0] == ["logging_steps: 10 -> 20, and max_expert_drop ends a stage at a logged step"]


def test_every_key_that_may_change_exists_and_is_not_refused():
    old = resolved()
    assert {*MAY_CHANGE} <= {*old}
    for name in MAY_CHANGE:
        assert differences(old, old | {name: "other"})[0] == []


@full
def test_a_finished_run_that_gets_more_stages_ends_as_one_that_had_them_from_the_start(tmp_path):
    keys = {"prompts_per_stage": "all", "max_train_samples": 48}
    run(tmp_path / "whole", **keys, stages=2, learning_rate=[1e-5, 2e-5])
    run(tmp_path / "grown", **keys, stages=1, learning_rate=1e-5)
    first = contents(tmp_path / "grown" / "final")
    more = {"stages": 2, "learning_rate": [1e-5, 2e-5], "logging_steps": 1, "per_device_eval_batch_size": 63}
    _, err = run(tmp_path / "grown", **keys, **more)
    assert "continues with stages: 1 -> 2 (more stages)" in err.splitlines()[0]
    grown, whole = contents(tmp_path / "grown" / "final"), contents(tmp_path / "whole" / "final")
    assert grown == whole != first
    assert "stage-01" in (tmp_path / "grown" / "report.html").read_text()


def started(folder):
    """Start a process that holds the lock of the folder."""
    command = [sys.executable, "-m", "tests.helpers.hold_lock", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_folder_has_one_run_at_a_time_and_a_killed_run_leaves_no_lock(tmp_path):
    holder = started(tmp_path)
    owner, child = map(int, holder.stdout.readline().split())
    try:
        with pytest.raises(InputError, match=rf"output_dir \S+: process {owner} on \S+, started .* is running in it"):
            lock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # the child lives
        lock(tmp_path)
        lock(tmp_path)  # a process may lock twice
    finally:
        os.kill(child, signal.SIGKILL)
        if path := next((path for path in LOCKS if path.parent == tmp_path), None):
            LOCKS.pop(path).close()


def test_a_second_run_in_the_folder_names_the_first_before_it_reads_data(finished):
    output = finished[0]
    holder = started(output)
    owner, child = map(int, holder.stdout.readline().split())
    try:
        _, err = run(output, code=2)
        assert f"process {owner} on " in err and "demonstrations:" not in err
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
