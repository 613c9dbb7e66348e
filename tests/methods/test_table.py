"""The tables of methods and of policy losses: one entry per name, wherever the name can be written."""

from typing import get_args, get_type_hints

import pytest

from irlfast.config import make_config
from irlfast.config.checks import EACH_REWARD_ALONE
from irlfast.config.methods import METHOD_FACTS, OWN_KL, SFT_TEACHERS
from irlfast.config.schema import Config
from irlfast.config.types import PairLossName
from irlfast.losses.policy import POLICY_LOSSES
from irlfast.losses.rewards import GAUSSIAN
from irlfast.losses.sft import SFT_LOSSES
from irlfast.methods import METHODS
from irlfast.ops.pair_loss.losses import PAIR_LOSSES
from irlfast.ops.rewards.losses import REWARD_LOSSES
from irlfast.reports.files import phase_order


def values_of(key: str) -> tuple[str, ...]:
    return get_args(get_type_hints(Config)[key])


def test_each_method_that_the_schema_takes_has_facts_and_functions():
    assert set(values_of("method")) == METHOD_FACTS.keys() == METHODS.keys()
    for name, facts in METHOD_FACTS.items():
        assert facts.has_stages == (METHODS[name].stage is not None)


def test_each_alignment_that_the_schema_takes_has_a_policy_loss():
    assert set(values_of("align")) == POLICY_LOSSES.keys()
    assert set(OWN_KL) == {name for name, loss in POLICY_LOSSES.items() if loss.has_own_kl or loss.loss is None}


def test_each_loss_of_sft_that_the_schema_takes_has_a_function():
    assert set(values_of("sft_loss_type")) == SFT_LOSSES.keys()
    assert SFT_TEACHERS.keys() == {name for name, loss in SFT_LOSSES.items() if loss.teacher}


def test_reward_losses_and_divergences_have_the_names_that_ops_has():
    assert set(values_of("reward_loss")) == REWARD_LOSSES.keys() | {GAUSSIAN}
    divergences = REWARD_LOSSES.keys() - {"bradley_terry", "linear", "bce"}
    assert {name for value in values_of("divergence") for name in get_args(value)} == divergences


def rounds_of(stage: int, rounds: int) -> list[str]:
    """Return the phases of a stage's rounds where the reward learns in each."""
    names = [f"stage-{stage:02d}/round-{number:02d}" for number in range(rounds)]
    policies = [*names[:-1], f"stage-{stage:02d}"]
    return [phase for name, policy in zip(names, policies, strict=True) for phase in (f"{name}/reward", policy)]


def test_the_configuration_knows_which_losses_take_each_reward_alone():
    alone = {name for name in get_args(PairLossName) if not PAIR_LOSSES[name].of_margin}
    assert set(EACH_REWARD_ALONE) == alone


PHASES = {
    "irft": ["sft", "stage-00", "stage-01"],
    "spin": ["sft", "stage-00", "stage-01"],
    "t_spin": ["sft", "stage-00", "stage-01"],
    "dpo": ["sft", "stage-00", "stage-01"],
    "rft": ["sft", "stage-00/reward", "stage-00", "stage-01/reward", "stage-01"],
    "afd": ["sft", "stage-00/reward", "stage-00", "stage-01/reward", "stage-01"],
    "gad": [
        "sft",
        "stage-00/reward",
        *(name for stage in range(2) for name in rounds_of(stage, 8)),
    ],
    "r_airl": ["sft", "stage-00/reward", *rounds_of(0, 8), *rounds_of(1, 8)],
    "sdft": ["sft", "stage-00", "stage-01"],
    "reasoning": ["sft", "stage-00", "stage-01"],
    "reward": ["sft", "stage-00/reward"],
    "sft": ["sft"],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_phases_of_a_method_with_sft_and_two_stages(method):
    config = make_config(
        {"dataset_name": __file__, "model_name_or_path": ".", "method": method, "stages": 2, "sft_steps": 3}
    )
    phases = list(METHODS[method].phases(config, 96))
    assert [phase.name for phase in phases] == PHASES[method]
    assert len(phases[0].plan().steps) == 3
    assert all(len(phase.plan().steps) > 0 for phase in phases)
    policies = [phase.name for phase in phases if "/" not in phase.name]
    assert policies == [phase.name for phase in phases if f"{phase.name}/eval.json" in phase.files]


def test_a_reward_that_does_not_depend_on_the_policy_is_learned_once():
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "method": "rft", "stages": 2, "align_rounds": 2}
    config = make_config(keys | {"reward_data": "init_demo"})
    assert [phase.name for phase in METHODS["rft"].phases(config, 96)] == [
        "stage-00/reward",
        "stage-00/round-00",
        "stage-00",
        "stage-01/round-00",
        "stage-01",
    ]


def test_a_reward_that_learns_in_every_round_is_warmed_up_once():
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "method": "rft", "stages": 2, "align_rounds": 2}
    phases = list(METHODS["rft"].phases(make_config(keys | {"reward_every": "round", "num_generations": 4}), 96))
    assert [phase.name for phase in phases] == ["stage-00/reward", *rounds_of(0, 2), *rounds_of(1, 2)]
    assert [len(phase.plan().steps) for phase in phases[:3]] == [6, 12, 3]  # 48 pairs, 24 prompts of 4 answers
    assert sorted((phase.name for phase in phases), key=phase_order) == [phase.name for phase in phases]


def test_reward_models_that_learn_apart_have_a_phase_each_and_share_the_answers():
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "method": "gad", "align_rounds": 1, "sft_epochs": 0}
    phases = list(METHODS["gad"].phases(make_config(keys | {"reward_models": 2}), 96))
    assert [(phase.name, phase.sampled) for phase in phases] == [
        ("stage-00/reward", 96),
        ("stage-00/reward-01", 0),
        ("stage-00/round-00/reward", 0),
        ("stage-00/round-00/reward-01", 0),
        ("stage-00", 96 * 8),
    ]
    assert sorted((phase.name for phase in phases), key=phase_order) == [phase.name for phase in phases]
