"""EBFT as a user runs it: its features, a kill and a resume, and wrong combinations of its keys."""

import json

import pytest
from safetensors.torch import load_file

from irlfast.common.files import InputError
from irlfast.config import make_config
from tests.helpers.runs import contents, run, run_killed_at

KEYS = {"method": "rft", "reward_data": "none", "feature_reward": [0.5, 1.0], "num_generations": 3, "stages": 1}
SMALL = {"max_train_samples": 16, "max_eval_samples": 4, "sft_steps": 0, "inner_steps": 2, "kl_in": "none"}


def test_a_run_keeps_the_features_of_answers_and_demonstrations_and_resumes_to_the_same_bytes(tmp_path):
    run(tmp_path / "whole", **KEYS, **SMALL)
    features = load_file(tmp_path / "whole/stage-00/reward-0.safetensors")["values"]
    assert features.shape == (16 * 4, 2 * 64)  # three answers and a demonstration per prompt, two depths
    assert features.norm(dim=1).sub(1).abs().max() < 1e-5
    metrics = json.loads((tmp_path / "whole/stage-00/round.json").read_text())
    assert -4 < metrics["reward"] < 2
    assert metrics["reward_std"] > 0
    run_killed_at(tmp_path / "killed", ["stage-00/reward-0.safetensors"], **KEYS, **SMALL)
    run(tmp_path / "killed", **KEYS, **SMALL)
    assert contents(tmp_path / "killed/final") == contents(tmp_path / "whole/final")


@pytest.mark.parametrize(
    "keys", [{"num_generations": 2}, {"align": "apa"}, {"align": "bon"}, {"reward_credit": "token"}]
)
def test_the_price_of_similar_answers_needs_the_leave_one_out_baseline_of_three_answers(keys):
    given = KEYS | {"dataset_name": __file__, "model_name_or_path": "."}
    make_config(given)
    with pytest.raises(InputError, match=r"feature_reward: found .* expected rloo or ppo, 3 or more, and sequence"):
        make_config(given | keys)
