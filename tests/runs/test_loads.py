"""How often a run loads its models: each load of a large one takes minutes."""

import collections
import json

import pytest

from tests.helpers.runs import ROOT, printed, settings
from tests.helpers.storm import stand_in
from tests.helpers.tiers import full_then_slow

IRFT = {"max_train_samples": 32, "inner_steps": 2, "sft_steps": 2, "stages": 2}
RFT = {**IRFT, "method": "rft", "align_rounds": 2, "num_generations": 2, "reward_steps": 2, "beta": 0.1}


def loads_of(folder, **keys) -> dict[str, dict[str, int]]:
    """By phase, how often its policy was loaded: to sample, to score or to train. Rewards do not count."""
    counter = [str(ROOT / "tests/helpers/count_loads.py"), str(folder / "loads.json")]
    printed([*counter, *settings(folder / "run", **keys)])
    by_policy: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for who, name in json.loads((folder / "loads.json").read_text()):
        if name.endswith("/policy"):
            by_policy[name.removeprefix(f"{folder}/run/").removesuffix("/policy")][who] += 1
    return {name: dict(counts) for name, counts in by_policy.items()}


def test_vllm_starts_once_per_policy_and_the_policy_is_loaded_once_to_score_and_train(tmp_path):
    loads = loads_of(tmp_path, **IRFT, use_vllm=True, vllm_python=stand_in(tmp_path / "bin"))
    assert set(loads) == {"initial", "sft", "stage-00", "stage-01"}
    assert all(loads[name] == {"samples": 1, "scores": 1} for name in ("sft", "stage-00", "stage-01")), loads


@pytest.mark.parametrize("keys", full_then_slow([RFT, IRFT]), ids=["rft", "irft"])
def test_by_transformers_a_policy_is_loaded_once_and_again_where_a_reward_model_came_between(tmp_path, keys):
    """RFT loads a policy to answer, then its rewards, then the policy to train, and later once as the reference."""
    loads = loads_of(tmp_path, **keys)
    most = 3 if keys is RFT else 1
    assert all(sum(counts.values()) <= most for counts in loads.values()), loads
