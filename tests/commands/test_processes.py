"""The same command on another number of processes is the same run: the same steps, data and losses."""

import json
import random

import pytest
from safetensors.torch import load_file

from tests.helpers.runs import command, printed, run, settings
from tests.helpers.tiers import full, slow

# The first update of RMSprop moves a weight by 10·rate·g/(|g| + 1e-7): rounding of a gradient g near 0 moves it, too.
# At a rate of 1e-3, losses of two processes differ by 4e-4 for that (afd, seed 2; in fp64 by 1e-12), at 1e-4 by 7e-6.
REWARD = {"num_generations": 2, "reward_steps": 2, "reward_learning_rate": 1e-4, "align_rounds": 2}
METHODS = {
    "irft": {"nll_weight": 0.1},
    "rft": {"method": "rft", **REWARD},
    "afd": {"method": "afd", **REWARD, "reward_level": "token"},
    "sft": {"method": "sft", "inner_steps": "null"},
}
SMALL = {"max_train_samples": 40, "max_eval_samples": 4, "max_new_tokens": 6, "stages": 1, "inner_steps": 3}
SMALL |= {"sft_steps": 3, "logging_steps": 1, "save_steps": 0, "learning_rate": 1e-6, "sft_learning_rate": 1e-4}
SMALL["eval_every_stage"] = "false"
# Figures of the machine; and the sign of margins, which are 0 but for rounding while the policy is the reference.
DIFFER = ("time/", "tokens_per_second", "memory", "tflops", "mfu", "seconds", "rewards/accuracies")
EXACT = ("learning_rate", "epoch", "length/chosen", "length/rejected", "length/synthetic")  # nothing rounds these

# Keys that shape no result, and values of them.
FREE = {
    "zero_stage": [1, 2, 3],
    "max_tokens_per_batch": [150, 400, "auto"],
    "gradient_checkpointing": ["true", "selective", "false"],
    "attn_implementation": ["eager", "sdpa"],
    "save_steps": [1, 2],
}


def rows_of(output) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not any(part in name for part in DIFFER)} for row in rows]


@pytest.mark.parametrize(
    ("method", "seed"),
    [
        pytest.param(method, seed, marks=full if seed == 0 and method in ("irft", "afd") else slow)
        for method in METHODS
        for seed in range(3)
    ],
)
def test_a_run_takes_the_same_steps_on_any_number_of_processes(tmp_path, method, seed):
    """Drawn batches, most of which the processes do not divide, and some of which have fewer prompts than these."""
    draw = random.Random(f"{method} {seed}")
    keys = {**SMALL, **METHODS[method], "global_batch_size": draw.randint(3, 9), "seed": seed}
    keys["sft_global_batch_size"] = draw.randint(2, 9)
    counts = [draw.choice([2, 4])] if seed == 0 else [2, 4]
    run(tmp_path / "1", 1, **keys)
    expected = rows_of(tmp_path / "1")
    assert {row["step"] for row in expected} >= {1, 2, 3}
    for count in counts:
        output = tmp_path / str(count)
        run(output, count, **keys)
        rows = rows_of(output)
        assert [{*row} for row in rows] == [{*row} for row in expected]
        for row, same in zip(rows, expected, strict=True):
            for name, value in same.items():
                # Each step adds rounding to weights that are near 1: a mean near 0 has the error of its terms.
                rounded = isinstance(value, float) and name not in EXACT
                near = pytest.approx(value, rel=1e-4, abs=1e-4) if rounded else value
                assert row[name] == near, (count, row["phase"], row["step"], name)
        assert_near(tmp_path / "1", output)
        assert json.loads((output / "starts.jsonl").read_text())["processes"] == count


def assert_near(run, other) -> None:
    """Both runs end at the same weights, compared with how far they have moved."""
    start = load_file(run / "initial" / "policy" / "model.safetensors")
    one, same = (load_file(output / "final" / "model.safetensors") for output in (run, other))
    moved = sum((one[name] - start[name]).norm() ** 2 for name in one) ** 0.5
    apart = sum((one[name] - same[name]).norm() ** 2 for name in one) ** 0.5
    assert apart < 1e-2 * moved


# Seed 2 goes on from ZeRO-2 to ZeRO-3 with layers that are recomputed but for their products.
@pytest.mark.parametrize("seed", [pytest.param(2, marks=full), *(pytest.param(seed, marks=slow) for seed in (0, 1, 3))])
def test_a_run_that_goes_on_with_other_values_of_keys_that_shape_no_result_ends_at_the_same_weights(tmp_path, seed):
    """It is preempted in SFT and in its stage, and goes on with drawn values, on a drawn number of processes."""
    draw, keys = random.Random(seed), {**SMALL, "global_batch_size": 6}
    run(tmp_path / "whole", 1, **keys)
    for phase in ("sft", "stage-00"):
        stop = json.dumps({"how": "loss nan", "phase": phase, "steps": [], "stop_at": 1})
        free = {name: draw.choice(values) for name, values in FREE.items()}
        arguments = ["-m", "tests.helpers.bad_steps", stop, *settings(tmp_path / "run", **keys | free)]
        printed(arguments, draw.choice([1, 2]), code=75)
        assert list((tmp_path / "run" / phase / "checkpoint").glob("step-*"))
    run(tmp_path / "run", draw.choice([1, 2]), **keys | {name: draw.choice(values) for name, values in FREE.items()})
    assert_near(tmp_path / "whole", tmp_path / "run")


@full
def test_a_run_that_goes_on_with_another_number_of_processes_says_so(tmp_path):
    keys = {**SMALL, **METHODS["sft"]}
    run(tmp_path / "run", 1, **keys, global_batch_size=4)
    _, err = run(tmp_path / "run", 2, **keys, global_batch_size=4)
    assert "continues with processes: 1 -> 2 (the same steps, to rounding)" in err
    arguments = command(tmp_path / "run", **keys, per_device_train_batch_size=4)
    other = [argument for argument in arguments if not argument.startswith("global_batch_size")]
    _, err = printed(other, 2, code=2)
    assert "its run has another configuration (global_batch_size: 4 -> 8)" in err
    _, err = printed(other, 1)
    assert "continues with processes: 2 -> 1" in err
