"""The mismatch between sampler and trainer: its measure, and the weights that correct it, on figures made by hand."""

import math

import pytest
import torch

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.sampling.mismatch import importance_weights, measure_mismatch

TRAINER = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
SAMPLER = [torch.tensor([-1.5, -2.25]), torch.tensor([-0.25])]


def test_the_measure_is_of_tokens_and_of_whole_answers(capfd):
    found = measure_mismatch(TRAINER, SAMPLER, "stage-01")
    longer, shorter = math.exp(0.75), math.exp(-0.25)
    assert found == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": 1 / 3,
            "sampling/sampling_logp_difference/max": 0.5,
            "sampling/importance_sampling_ratio/min": shorter,
            "sampling/importance_sampling_ratio/mean": (longer + shorter) / 2,
            "sampling/importance_sampling_ratio/max": longer,
        }
    )
    [line] = capfd.readouterr().err.splitlines()
    assert "stage-01: log-probabilities of tokens differ between sampler and trainer by 0.33 nats on average" in line
    assert measure_mismatch(TRAINER, [], "stage-01") == {}


@pytest.mark.parametrize(
    ("mode", "clip_max", "expected"),
    [
        ("token_truncate", None, [math.exp(0.5), math.exp(0.25)]),
        ("token_truncate", 1.5, [1.5, math.exp(0.25)]),
        ("token_mask", 1.5, [0.0, math.exp(0.25)]),
        ("sequence_truncate", None, [math.exp(0.75)] * 2),
        ("sequence_truncate", 2.0, [2.0, 2.0]),
        ("sequence_mask", 2.0, [0.0, 0.0]),
        ("sequence_mask", 3.0, [math.exp(0.75)] * 2),
    ],
)
def test_weights_are_cut_or_masked_by_token_or_by_answer(mode, clip_max, expected):
    weights = importance_weights(TRAINER[0], SAMPLER[0], mode, clip_max)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_a_token_that_the_sampler_does_not_know_counts_as_equal_and_no_weight_is_infinite():
    unknown = torch.tensor([float("nan"), -2.25])
    torch.testing.assert_close(
        importance_weights(TRAINER[0], unknown, "token_truncate", None), torch.tensor([1.0, math.exp(0.25)])
    )
    assert measure_mismatch(TRAINER[:1], [unknown], "x")["sampling/sampling_logp_difference/max"] == 0.25
    assert importance_weights(TRAINER[0], torch.full((2,), -9999.0), "sequence_mask", None).isfinite().all()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"vllm_importance_sampling_correction": True, "align": "apa"}, "found true with align apa, .* expected align"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "vllm_importance_sampling_clip_max: found 2.0 without weights"),
        ({"vllm_importance_sampling_mode": "token_mask"}, "vllm_importance_sampling_mode: found 'token_mask' without"),
    ],
)
def test_weights_without_a_policy_gradient_and_keys_without_weights_are_refused(keys, said):
    with pytest.raises(InputError, match=said):
        make_config({"dataset_name": __file__, "model_name_or_path": ".", "method": "rft", **keys})
