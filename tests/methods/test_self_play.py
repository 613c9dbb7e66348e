"""T-SPIN, and every loss on pairs, in runs of the trainer."""

import json
import typing

import pytest

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.config.types import PairLossName
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example
from irlfast.methods.t_spin import make_groups
from irlfast.sampling.generation import read_samples
from tests.helpers.runs import contents, run, run_killed_at
from tests.helpers.tiers import full, full_then_slow

T_SPIN = {"method": "t_spin", "max_train_samples": 32, "inner_steps": 3}
GIVEN = {"dataset_name": __file__, "model_name_or_path": "."}


def metrics_of(output, phase: str) -> dict[str, float]:
    """The last logged step of a phase."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase][-1]


def test_t_spin_learns_from_the_first_policys_answers_from_its_second_stage_on(tmp_path):
    run(tmp_path, **T_SPIN)
    first, second = (metrics_of(tmp_path, f"stage-0{stage}") for stage in (0, 1))
    assert "logps/first" not in first and second["logps/first"] < 0
    assert not any("logps/reference" in row for row in (first, second))
    assert not list(tmp_path.glob("stage-*/reference.safetensors"))
    samples = [read_samples([tmp_path / f"stage-0{stage}" / "samples/00000.jsonl"]) for stage in (0, 1)]
    assert len(samples[0]) == len(samples[1]) == 32
    counts = json.loads((tmp_path / "stage-01" / "pairs.json").read_text())
    assert counts["pairs"] + counts["dropped_empty"] == 32


@full
def test_t_spin_that_is_killed_in_its_second_stage_resumes_to_the_same_bytes(tmp_path):
    run(tmp_path / "unbroken", **T_SPIN)
    run_killed_at(tmp_path / "killed", ["stage-01/pairs.json", "stage-01/checkpoint/step-2"], **T_SPIN)
    run(tmp_path / "killed", **T_SPIN)
    assert contents(tmp_path / "killed" / "final") == contents(tmp_path / "unbroken" / "final")


def test_a_triplet_with_an_empty_answer_is_dropped_and_counted():
    examples = [Example([7], answer) for answer in ([1, 2], [3, 4], [5])]
    groups, counts = make_groups(1, examples, [[[1, 2], [3], [6]], [[8], [], [9]]])
    assert [*groups] == [PromptGroup([7], ([1, 2], [1, 2], [8])), PromptGroup([7], ([5], [6], [9]))]
    assert counts == {"pairs": 2, "dropped_empty": 1, "synthetic_tokens": 4}
    with pytest.raises(InputError, match=r"^stage-01: all 1 prompts have an empty answer"):
        make_groups(1, examples[:1], [[[]]])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompts_per_stage": "split"}, "^prompts_per_stage: found 'split' with method t_spin"),
        ({"loss_type": "space"}, "^loss_type: found space with method t_spin, which has no reference"),
        ({"loss_type": ["sigmoid", "iris"]}, "^loss_type: found iris with method t_spin"),
        ({"history": 1}, "^history: found 1 with method t_spin, which takes no history"),
        ({"nll_weight": 0.5}, "^nll_weight: found 0.5 with method t_spin, which takes no nll_weight"),
    ],
)
def test_t_spin_refuses_keys_of_other_methods(keys, message):
    with pytest.raises(InputError, match=message):
        make_config(GIVEN | {"method": "t_spin"} | keys)


def test_options_of_a_loss_are_refused_with_another_loss():
    for option in ({"reward_shift": 1.0}, {"renyi_alpha": 2.0}, {"renyi_alpha": [0.5, 0.9, 1.0]}):
        with pytest.raises(InputError, match="which loss_type sigmoid does not use"):
            make_config(GIVEN | option)
    assert make_config(GIVEN | {"loss_type": "space", "reward_shift": 1.0}).reward_shift == 1
    assert make_config(GIVEN | {"loss_type": "iris", "renyi_alpha": [2.0, 1.0, 0.5]}).at("renyi_alpha", 2) == 0.5
    with pytest.raises(InputError, match=r"^renyi_alpha: found 2 values, expected one or one per stage"):
        make_config(GIVEN | {"loss_type": "iris", "renyi_alpha": [2.0, 1.0]})


OPTIONS = {
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.001},
    "space": {"reward_shift": 1.0986},
    "iris": {"renyi_alpha": [0.9, 0.5]},
}


NAMES = ["sigmoid", "space", "iris", "exo_pair"]  # of CI: a plain one, and those with options of three kinds
NAMES += [name for name in typing.get_args(PairLossName) if name not in NAMES]


@pytest.mark.parametrize("loss_type", full_then_slow(NAMES, 4))
def test_every_loss_on_pairs_trains_and_raises_the_margin(tmp_path, loss_type):
    keys = {"loss_type": loss_type, "learning_rate": 1e-4, "inner_steps": 10} | OPTIONS.get(loss_type, {})
    run(tmp_path, **keys)
    for stage in (0, 1):
        assert metrics_of(tmp_path, f"stage-0{stage}")["rewards/margins"] > 0
