"""Signs in the logged values: spikes among noise and trends, phases that teach nothing."""

import json
import math
import random

import numpy as np
import pytest
import torch

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.alarms import LAST_ROWS, WATCHED, check_row, log_doubts, log_lessons, spikes
from irlfast.engine.plan import Plan
from tests.engine.test_bad_steps import command
from tests.helpers.runs import printed
from tests.helpers.tiers import slow

CONFIG = {"dataset_name": __file__, "model_name_or_path": "."}


def rows(values: list[float], name: str = "loss") -> list[dict]:
    return [{"phase": "sft", "step": step, "loss": 1.0, name: value} for step, value in enumerate(values, 1)]


def alarmed(values: list[float], name: str = "loss") -> list[int]:
    """The steps whose values are spikes."""
    logged = rows(values, name)
    return [row["step"] for n, row in enumerate(logged) if name in spikes(row, logged[max(0, n - LAST_ROWS) : n])]


@pytest.mark.parametrize("seed", range(30))
def test_noise_and_trends_are_no_spikes_and_a_value_far_from_both_is_one(seed):
    draw = random.Random(seed)
    size, noise = 10 ** draw.uniform(-2, 3), draw.uniform(0.02, 0.5)
    trend = draw.choice([lambda n: 1.0, lambda n: 1 + n / 40, lambda n: math.exp(-n / 40), lambda n: 2 - n / 40])
    values = [size * (trend(n) + noise * draw.gauss(0, 1)) for n in range(60)]
    name = draw.choice(WATCHED)
    assert alarmed(values, name) == []
    at, far = draw.randrange(20, 60), draw.choice([-1, 1]) * (30 * noise * size + 30 * 0.01 * max(1, 2 * size))
    spiked = [*values[:at], values[at] + 3 * far, *values[at + 1 :]]
    assert at + 1 in alarmed(spiked, name)


def test_the_first_rows_and_values_that_hardly_differ_are_no_spikes():
    assert alarmed([1.0] * 7 + [1e6]) == []
    assert alarmed([0.0] * 20 + [0.05]) == []
    assert alarmed([0.0] * 20 + [0.5]) == [21]


def test_a_spike_is_said_once_until_the_value_was_as_usual(capsys):
    config, before = make_config(CONFIG), []
    for row in rows([1.0] * 10 + [9.0] * 3 + [1.0, 9.0]):
        check_row(row, before, config)
        before.append(row)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: sft, step {step}: loss is 9, and was about 1 before" for step in (11, 15)]
    check_row(row, before[:10], make_config(CONFIG | {"on_spike": "ignore"}))
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"sft, step 15: loss is 9, .* try a lower learning_rate, or on_spike: warn"):
        check_row(row, before[:10], make_config(CONFIG | {"on_spike": "stop"}))


@slow
def test_a_run_stops_at_a_spike_stops_there_again_and_goes_on_when_told_to_warn(tmp_path):
    keys = {"sft_steps": 14, "logging_steps": 1, "save_steps": 4}
    fault = {"how": "loss times 1000", "phase": "sft", "steps": [11]}
    for _ in range(2):
        _, err = printed(command(tmp_path / "run", fault, on_spike="stop", **keys), code=2)
        assert err.splitlines()[-1].startswith("irlfast: sft, step 11: grad_norm is ")
    _, err = printed(command(tmp_path / "run", fault, on_spike="warn", **keys))
    assert "warning: sft, step 11: grad_norm is " in err and (tmp_path / "run" / "final").exists()
    logged = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged == [*range(1, 15)]


@pytest.mark.parametrize(
    ("rate", "advantages", "said"),
    [
        (1e6, [1.0], "with a learning rate of 1e+06, each step moves every weight by about 1e+06"),
        (1e-13, [1.0], "10 steps with a learning rate of 1e-13 move no weight by a notable amount"),
        (1e-5, [0.0, -0.0], "all advantages are 0, because each prompt's answers have the same reward"),
        (1e-5, [0.0, 1.0], ""),
        (1e-5, [], ""),
    ],
)
def test_settings_that_teach_nothing_are_said_at_the_start(capsys, rate, advantages, said):
    groups = [PromptGroup([1], ([2],), advantages=(torch.tensor([each]),)) for each in advantages]
    plan = Plan(0, [np.array([0])] * 10, rate, "rmsprop")
    log_doubts("stage-00", plan, groups or [PromptGroup([1], ([2],))])
    assert capsys.readouterr().err == (f"warning: stage-00: {said}\n" if said else "")


def test_a_phase_that_taught_nothing_is_said_at_its_end(capsys):
    def said(values: list[tuple[float, float]]) -> str:
        log_lessons("stage-00", [{"loss": loss, "grad_norm": norm} for loss, norm in values])
        return capsys.readouterr().err

    assert "nothing was learned, because the gradient was 0 at all 2 logged steps" in said([(1.0, 0.0), (2.0, 0.0)])
    assert "the loss did not move: it was 0.6931 at all 3 logged steps" in said([(math.log(2), 1.0)] * 3)
    assert said([(1.0, 1.0)]) == said([(1.0, 1.0), (1.1, 1.0)]) == said([]) == ""
