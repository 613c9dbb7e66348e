"""Steps whose loss or gradient is not finite change nothing, are named, and end a phase that has too many in a row."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import transformers

from irlfast.engine.bad_steps import lines
from irlfast.engine.optim import LOWER, set_lower_rate
from tests.helpers.runs import contents, kill_at, printed, run, settings
from tests.helpers.tiers import full, slow

SFT = {"method": "sft", "sft_steps": 8, "lr_scheduler_type": "constant", "warmup_ratio": 0, "save_steps": 2}
ALL_SFT = {**SFT, "inner_steps": "null", "stages": 1}


def command(output: Path, fault: dict, **keys) -> list[str]:
    return ["-m", "tests.helpers.bad_steps", json.dumps(fault), *settings(output, **{**ALL_SFT, **keys})]


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("processes", "seed"),
    [(1, 0), pytest.param(2, 3, marks=full), *(pytest.param(n, seed, marks=slow) for n in (1, 2) for seed in range(9))],
)
def test_drawn_bad_steps_change_neither_weights_nor_optimiser_at_every_zero_stage(tmp_path, processes, seed):
    """The fault is in the last process alone; all processes skip the step."""
    out, _ = printed(["-m", "tests.helpers.skipped_steps", str(tmp_path), str(seed)], processes)
    results = json.loads(out.splitlines()[-1])
    assert len(results) == 6
    for case, row in results.items():
        assert row["skipped"] == [row["bad"]] * processes, case
        assert row["same"] and row["none"] == [], case
        assert row["places"] == [*range(7)], case


def test_a_row_whose_loss_is_not_finite_is_named_and_the_run_ends_as_without_its_steps(tmp_path):
    steps = [2, 5, 6]
    _, err = printed(command(tmp_path / "run", {"how": "one group", "phase": "sft", "steps": steps}))
    printed(command(tmp_path / "without", {"how": "absent", "phase": "sft", "steps": steps}))
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "without" / "final")
    named = json.loads(err.split("lines of the first groups: ")[1].splitlines()[0])
    for step, line in zip(steps, named, strict=True):
        assert (
            f"warning: sft, step {step} is skipped: its loss is not finite; see line {line} of data/rows.jsonl" in err
        )
    assert "warning: sft: 3 of 8 steps were skipped, because their loss or gradient was not finite" in err
    rows = rows_of(tmp_path / "run")
    assert [(row["step"], row["bad_steps"]) for row in rows] == [(2, 1), (4, 1), (8, 3)]  # 5 and 6 have none
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)


@slow
@pytest.mark.parametrize("seed", range(9))
def test_a_run_with_drawn_bad_steps_ends_as_without_them_wherever_it_is_killed(tmp_path, seed):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(1, 8), draw.randint(1, 5)))
    how, processes = draw.choice(["loss nan", "loss inf", "gradient nan", "one group"]), draw.choice([1, 2])
    keys = {"max_bad_steps": 9, "zero_stage": draw.randint(1, 3), "dtype": draw.choice(["float32", "bfloat16"])}
    arguments = command(tmp_path / "run", {"how": how, "phase": "sft", "steps": steps}, **keys)
    saved = [f"sft/checkpoint/step-{step}" for step in (2, 4, 6) if step not in steps]
    kill_at(tmp_path / "run", sorted(draw.sample(saved, draw.randint(0, len(saved)))), arguments, processes)
    printed(arguments, processes)
    printed(command(tmp_path / "without", {"how": "absent", "phase": "sft", "steps": steps}, **keys), processes)
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "without" / "final")
    assert rows_of(tmp_path / "run")[-1]["bad_steps"] == len(steps)


GONE_BACK = {"how": "loss nan", "phase": "sft", "steps": [5, 6, 7], "until_lower": True}


@full
def test_a_phase_goes_back_to_its_checkpoint_with_a_lower_rate_wherever_it_is_killed(tmp_path):
    _, err = printed(command(tmp_path / "run", GONE_BACK, logging_steps=1))
    assert "the phase goes back to step 4, and continues with a tenth of the learning rate" in err
    note = json.loads((tmp_path / "run" / "sft" / "lower_rate.json").read_text())
    assert note["after_step"] == 4 and note["bad_steps"] == [5, 6, 7] and len(note["rows"]) == 24
    rates = {row["step"]: row["learning_rate"] for row in rows_of(tmp_path / "run")}
    assert rates == pytest.approx({step: 1e-3 if step <= 4 else 1e-4 for step in range(1, 9)})
    expected = contents(tmp_path / "run" / "final")
    for number, moments in enumerate((["sft/lower_rate.json", "sft/checkpoint/step-6"], ["sft/checkpoint/step-2"])):
        output = tmp_path / str(number)
        kill_at(output, moments, command(output, GONE_BACK))
        printed(command(output, GONE_BACK))
        assert contents(output / "final") == expected


@slow
def test_a_phase_that_was_preempted_goes_back_as_one_that_was_not(tmp_path):
    fault, keys = GONE_BACK | {"steps": [6, 7, 8]}, {"sft_steps": 10, "save_steps": 4}
    printed(command(tmp_path / "whole", fault, **keys))
    arguments = command(tmp_path / "run", fault | {"stop_at": 5}, **keys)
    printed(arguments, code=75)
    assert [path.name for path in (tmp_path / "run/sft/checkpoint").glob("step-*")] == ["step-5"]
    _, err = printed(arguments)
    assert "the phase goes back to step 4, and continues with a tenth of the learning rate" in err
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "whole" / "final")


@slow
def test_a_phase_whose_lower_rate_is_lost_repeats_it(tmp_path):
    printed(command(tmp_path / "whole", GONE_BACK))
    arguments = command(tmp_path / "run", GONE_BACK)
    kill_at(tmp_path / "run", ["sft/checkpoint/step-6"], arguments)
    (tmp_path / "run" / "sft" / "lower_rate.json").unlink()
    printed(arguments)
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "whole" / "final")


@pytest.mark.parametrize("processes", [pytest.param(1, marks=full), pytest.param(2, marks=slow)])
def test_a_phase_that_goes_bad_twice_stops_with_the_lines_to_look_at_and_stops_again_when_started_again(
    tmp_path, processes
):
    fault = {"how": "gradient nan", "phase": "sft", "steps": [3, 4], "ranks": [0]}
    arguments = command(tmp_path / "run", fault, max_bad_steps=2)
    for _ in range(2):
        _, err = printed(arguments, processes, code=2)
        sentence = err.splitlines()[-1]
        said = sentence.replace("irlfast, process 1: ", "irlfast: ")  # both stop at once, and the first one says why
        assert said.startswith("irlfast: sft, steps 3 to 4: loss or gradient were not finite, also with a")
        assert " and 6 more of data/rows.jsonl, and try a lower learning_rate, or a higher max_bad_steps" in sentence
    assert not (tmp_path / "run" / "sft" / "policy").exists()
    _, err = printed(command(tmp_path / "run", fault, max_bad_steps=3), processes)
    assert "max_bad_steps: 2 -> 3" in err and (tmp_path / "run" / "final").exists()


@full
def test_a_phase_that_stopped_goes_on_with_the_lower_rate_that_its_sentence_advises(tmp_path):
    fault = {"how": "loss nan", "phase": "sft", "steps": [5, 6]}
    _, err = printed(command(tmp_path / "run", fault, max_bad_steps=2), code=2)
    assert "and try a lower learning_rate" in err.splitlines()[-1]
    _, err = run(tmp_path / "run", code=2, **ALL_SFT, max_bad_steps=2, sft_learning_rate=2e-3)
    assert "another configuration (sft_learning_rate: 0.001 -> 0.002)" in err
    _, err = run(tmp_path / "run", **ALL_SFT, max_bad_steps=2, sft_learning_rate=2e-4)
    change = "sft_learning_rate: 0.001 -> 0.0002 (lower, in the phases that are not finished)"
    assert f"continues with {change}" in err
    rates = {row["step"]: row["learning_rate"] for row in rows_of(tmp_path / "run")}
    assert rates == pytest.approx({2: 1e-3, 4: 1e-3, 6: 2e-4, 8: 2e-4})
    starts = [json.loads(line)["changes"] for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert starts == [[], [change]]
    assert "sft_learning_rate: 0.001 -&gt; 0.0002" in (tmp_path / "run" / "report.html").read_text()
    assert "sft_learning_rate: 0.0002" in (tmp_path / "run" / "config.yaml").read_text()


@slow
@pytest.mark.parametrize("steps", [[8], [7, 8]])
def test_a_phase_may_end_in_bad_steps_if_its_model_is_sound(tmp_path, steps):
    _, err = printed(command(tmp_path / "run", {"how": "one group", "phase": "sft", "steps": steps}))
    assert f"{len(steps)} of 8 steps were skipped" in err and "goes back" not in err
    printed(command(tmp_path / "without", {"how": "absent", "phase": "sft", "steps": steps}))
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "without" / "final")


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "constant", "constant_with_warmup"])
def test_a_lower_rate_is_a_tenth_of_the_schedules_from_its_step_on_whenever_it_is_set(kind, after):
    def rates(set_at: int | None) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = transformers.get_scheduler(kind, optimizer, 1, num_training_steps=6)
        used = []
        for step in range(6):
            if step == set_at:
                set_lower_rate(scheduler, after)
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return used

    plain = rates(None)
    expected = [rate * (LOWER if step >= after else 1) for step, rate in enumerate(plain)]
    for set_at in range(after + 1):
        assert rates(set_at) == pytest.approx(expected, rel=1e-12)


def test_lines_count_from_one_and_many_are_cut():
    assert lines([]) == "data/rows.jsonl"
    assert lines([3]) == "line 4 of data/rows.jsonl"
    assert lines([*range(12)]) == "lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more of data/rows.jsonl"
