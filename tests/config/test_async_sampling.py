"""``async_sampling`` is refused where it has no sense, in a sentence that names the key and what is expected."""

import pytest
import torch

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.runs.output import differences
from irlfast.startup.limits import check_vllm

KEYS = {"dataset_name": __file__, "model_name_or_path": ".", "use_vllm": True, "async_sampling": True}
SERVER = {"vllm_server": ["http://localhost:1"]}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"stages": 1}, "async_sampling: found true with stages 1, where no stage trains before"),
        ({"use_vllm": False}, "async_sampling: found true with use_vllm: false, .* expected use_vllm: true"),
        *(
            ({"method": method, "stages": 2}, f"async_sampling: found true with method {method}, which learns from")
            for method in ("dpo", "sdft", "reasoning", "reward")
        ),
        ({"method": "sft", "sft_steps": 1}, "async_sampling: found true with method sft, which learns from"),
        *(
            (
                {"method": "rft", "align": align},
                f"found true with align {align}, .* vllm_importance_sampling_correction",
            )
            for align in ("rloo", "ppo", "grpo")
        ),
        ({"async_sampling": False, "async_sampling_at": 0.4}, "async_sampling_at: found 0.4 without async_sampling"),
        ({"async_sampling_at": 1.0}, "async_sampling_at"),
    ],
)
def test_senseless_combinations_are_refused(keys, said):
    with pytest.raises(InputError, match=said):
        make_config(KEYS | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        SERVER,
        {"method": "spin"},
        {"method": "t_spin"},
        {"method": "rft", "vllm_importance_sampling_correction": True},
        {"method": "afd", "align": "bon"},
        {"method": "rft", "align": "apa"},
    ],
)
def test_other_combinations_are_taken(keys):
    assert make_config(KEYS | keys).async_sampling


def test_on_gpus_that_train_only_servers_sample(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"async_sampling: found true on GPUs that train, .* expected vllm_server"):
        check_vllm(make_config(KEYS))


def test_a_run_that_has_started_takes_no_further_stage(monkeypatch):
    """The last stage of a run has no early policy that could have answered."""
    keys = {"prompts_per_stage": "all", "async_sampling": True, "stages": 2}
    [refused], allowed = differences(keys | {"learning_rate": 1}, keys | {"learning_rate": 1, "stages": 3})
    assert refused == "stages: 2 -> 3, and with async_sampling the last stage has asked nothing for a further one"
    assert not allowed
