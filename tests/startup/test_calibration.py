"""``irlfast plan --calibrate RUN``: rates from what a run logged, and a sentence for a folder that is no such run."""

import json
import shutil
import statistics
from pathlib import Path

import pytest

from irlfast.common.artefacts import keep_json
from irlfast.common.files import InputError, read_json
from irlfast.common.logs import read_log, rewrite
from irlfast.config import make_config
from irlfast.models.costs import Costs
from irlfast.runs.metrics_log import is_logged
from irlfast.startup.calibration import (
    Measured,
    hook_seconds,
    operations_of,
    rates_of_run,
    read_run,
    training_rate,
    warm_rows,
)
from irlfast.startup.plan_memory import TRAINING_MOMENTS, Room, most
from irlfast.startup.plan_run import plan_run, work_on
from irlfast.startup.plan_seconds import Rates
from irlfast.startup.sizes import Size
from tests.helpers.runs import printed, settings

ASSUMED = Rates(1.0, 2.0, 3.0)
SIZE = Size(1000, 1000, 4, 10, 50, 0, Costs(3000, 3000, 12), forward=1000)
GIVEN = {"dataset_name": __file__, "model_name_or_path": ".", "method": "sft"}


def row_of(forward, backward, processes=1):
    """A row of metrics of 10 tokens, 4 answer tokens and 20 attended pairs per process, with seconds of two parts."""
    seconds = forward + backward
    done = 3000 * 10 + 3000 * 4 + 12 * 20
    return {
        "phase": "sft",
        "step": 2,
        "seconds": seconds,
        "tokens_per_second": processes * 10 / seconds,
        "answer_tokens_per_second": processes * 4 / seconds,
        "tflops": done / seconds / 1e12,
        "time/forward": forward / seconds,
        "time/backward": backward / seconds,
    }


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_a_row_are_those_of_its_passes_with_layers_computed_twice(processes, checkpointing):
    config = make_config(GIVEN | {"gradient_checkpointing": checkpointing})
    forward = 1000 * 10 + 2 * 50 * 10 * 4 + 12 * 20 / 3
    again = 1000 * 10 + 12 * 20 / 3 if checkpointing else 0
    row = row_of(1.0, 3.0, processes)
    assert operations_of(row, config, SIZE, processes) == pytest.approx((forward, 42240 - forward + again))
    assert training_rate(row, config, SIZE, processes) == pytest.approx((42240 + again) / 4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_seconds_of_hooks_are_told_from_those_of_computing(checkpointing):
    config = make_config(GIVEN | {"gradient_checkpointing": checkpointing, "zero_stage": 3})
    forward, backward = operations_of(row_of(1.0, 1.0, 2), config, SIZE, 2)
    rate, hooks, passes = 1e4, 0.7, 2 if checkpointing else 1
    row = row_of(forward / rate + hooks, backward / rate + passes * hooks, 2)
    run = Measured(config, SIZE, 2, False, [row], None)
    assert hook_seconds(run, row) == pytest.approx(hooks)
    assert training_rate(row, config, SIZE, 2, (1 + passes) * hooks) == pytest.approx(rate)
    assert hook_seconds(run._replace(on_gpu=True), row) == 0
    assert hook_seconds(run._replace(config=make_config(GIVEN | {"zero_stage": 2})), row) == 0


def test_a_plan_has_the_rates_of_a_saved_run_and_its_memory(finished, tmp_path):
    output = finished[0]
    run = read_run(output)
    rates = rates_of_run(output, ASSUMED, 1, on_gpu=False)
    rows = [row for row in read_log(output / "metrics.jsonl", is_logged)[0] if row["step"] > 2]  # two steps a row
    spent = [row["seconds"] * (row["time/forward"] + row["time/backward"]) for row in rows]
    done = [row["tflops"] * 1e12 * row["seconds"] for row in rows]
    assert rates.training == pytest.approx(statistics.median(a / b for a, b in zip(done, spent, strict=True)))
    assert rates.memory > 1e6 and rates.link == ASSUMED.link and rates.sampling > 0
    halved = rates_of_run(output, ASSUMED, 2, on_gpu=False)  # two processes share the cores of one
    assert (halved.training, halved.memory) == pytest.approx((rates.training / 2, rates.memory / 2))
    room = Room(0.0, 1, on_gpu=False, runtime=rates.runtime)
    planned = plan_run(run.config, run.size, room, rates, work_on(run.config, run.train, 0, 0))
    largest = max(row["memory_gib"] for row in run.rows) * 2**30
    assert most({moment: planned.memory[moment] for moment in TRAINING_MOMENTS}) == pytest.approx(largest)
    step = statistics.median(row["seconds"] for row in rows if row["phase"] != "sft") / 2
    stage = next(phase for phase in planned.phases if phase.name == "stage-01")
    assert sum(stage.step.values()) == pytest.approx(step, rel=0.5)
    out, _ = printed(["-m", "irlfast.plan", *settings(tmp_path / "run"), "--calibrate", str(output)])
    assert f"1 process, {rates.training / 1e12:.3f} TFLOP/s, measured in {output}, with 1 process\n" in out


def test_the_first_two_steps_of_a_phase_are_its_warm_up(finished, tmp_path):
    output = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    rows = [row | {"step": row["step"] // 2} for row in read_log(output / "metrics.jsonl", is_logged)[0]]
    rewrite(output / "metrics.jsonl", rows)  # rows of one step each
    assert {row["step"] for row in rows} == {1, 2, 3}
    run = read_run(output)
    warm = [training_rate(row, run.config, run.size, 1) for row in run.rows if row["step"] == 3]
    assert rates_of_run(output, ASSUMED, 1, on_gpu=False).training == pytest.approx(statistics.median(warm))


def test_a_phase_without_a_step_after_its_warm_up_gives_the_second_one():
    rows = [{"phase": phase, "step": step} for phase in ("sft", "stage-00") for step in (1, 2)]
    assert warm_rows(rows) == [rows[1], rows[3]]
    assert warm_rows([*rows, {"phase": "stage-00", "step": 3}]) == [{"phase": "stage-00", "step": 3}]
    assert warm_rows(rows[:1]) == []


def test_one_process_sends_nothing_whatever_its_clock_says(finished, tmp_path):
    output = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    rows = [row | {"time/communication": 1e-6} for row in read_log(output / "metrics.jsonl", is_logged)[0]]
    rewrite(output / "metrics.jsonl", rows)
    assert rates_of_run(output, ASSUMED, 1, on_gpu=False).link == ASSUMED.link


def test_a_wait_for_answers_that_came_beside_training_is_no_rate_of_sampling(finished, tmp_path):
    output = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    keep_json(output / "stage-01/pairs.json", read_json(output / "stage-00/pairs.json") | {"sample_seconds": 1e9})
    both = rates_of_run(output, ASSUMED, 1, on_gpu=False).sampling
    beside = {"sampling/staleness": 5, "sample_seconds": 1e9}
    keep_json(output / "stage-01/pairs.json", read_json(output / "stage-00/pairs.json") | beside)
    assert rates_of_run(output, ASSUMED, 1, on_gpu=False).sampling < both / 1e3


DAMAGES = {
    "config.yaml": "found no config.yaml, expected the folder of a run that has trained",
    "metrics.jsonl": "found no metrics.jsonl, expected the folder of a run that has trained",
    "data/train.safetensors": "found no data/train.safetensors, expected the folder of a run that has trained",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_without_a_file_of_a_run_ends_with_one_sentence(finished, tmp_path, name):
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(InputError, match=f"^--calibrate {tmp_path / 'copy'}: {DAMAGES[name]}$"):
        rates_of_run(tmp_path / "copy", ASSUMED, 1, on_gpu=False)


FOREIGN = [
    ("config.yaml", "defaults:\n- model: gpt\n", r"is not the folder of a run \(unknown key 'defaults' in the conf"),
    ("config.yaml", "a: [", r"is not the folder of a run \("),
    ("config.yaml", "- 1\n", r"is not the folder of a run \("),
    ("starts.jsonl", '{"pid": 1}\n', r"is not the folder of a run \("),
    ("data/train.safetensors", "no tensors", r"is not the folder of a run \("),
    (
        "metrics.jsonl",
        '{"epoch": 1, "loss": 2.0}\n' * 9,
        "found 0 rows of a policy in metrics.jsonl, expected at least",
    ),
]


@pytest.mark.parametrize(("name", "text", "reason"), FOREIGN)
def test_a_folder_of_another_program_ends_with_one_sentence(finished, tmp_path, name, text, reason):
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(text)
    with pytest.raises(InputError, match=f"^--calibrate {tmp_path / 'copy'}: {reason}") as caught:
        rates_of_run(tmp_path / "copy", ASSUMED, 1, on_gpu=False)
    assert "\n" not in str(caught.value)


def test_a_run_on_another_kind_of_device_is_refused(finished, tmp_path):
    with pytest.raises(InputError, match=r": found a run on a CPU, expected one on a GPU, as the plan is$"):
        rates_of_run(finished[0], ASSUMED, 8, on_gpu=True)
    shutil.copytree(finished[0], tmp_path / "gpu")
    start = json.loads((tmp_path / "gpu/starts.jsonl").read_text().splitlines()[0])
    (tmp_path / "gpu/starts.jsonl").write_text(json.dumps(start | {"device": "NVIDIA H200"}) + "\n")
    with pytest.raises(InputError, match=r": found a run on a GPU, expected one on a CPU, as the plan is$"):
        rates_of_run(tmp_path / "gpu", ASSUMED, 8, on_gpu=False)
    assert rates_of_run(tmp_path / "gpu", ASSUMED, 8, on_gpu=True).training == pytest.approx(
        rates_of_run(finished[0], ASSUMED, 1, on_gpu=False).training
    )
