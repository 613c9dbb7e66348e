"""FusedRMSprop under DeepSpeed: every ZeRO stage, ZeRO-Offload, universal checkpoints, one process and two."""

import json

import pytest
import torch

from tests.helpers.runs import printed
from tests.helpers.tiers import full, slow


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=full)])
def test_steps_are_pytorchs_at_every_zero_stage_with_the_optimiser_offloaded_or_not(tmp_path, processes):
    out, _ = printed(["-m", "tests.helpers.zero_steps", str(tmp_path)], processes)
    results = json.loads(out.splitlines()[-1])
    assert len(results) == 8
    for case, row in results.items():
        assert row["error"] < 2e-6, case  # parameters are up to 0.3, and steps start at 1e-2
        assert {state.split()[0] for state in row["state"]} == {"torch.float32"}, case
        assert "offload cpu" not in case or "ZeRO 0" in case or row["state"] == ["torch.float32 on cpu"], case


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_bfloat16_gradients_over_many_micro_batches_are_those_of_one_large_batch(tmp_path, processes):
    out, _ = printed(["-m", "tests.helpers.accumulated_steps", str(tmp_path)], processes)
    norms = json.loads(out.splitlines()[-1])
    assert len(norms) == 3
    for stage, (micro, large) in norms.items():
        assert micro == pytest.approx(large, rel=0.01), stage  # sums in bfloat16 are 2% off


@full
def test_universal_checkpoints_go_on_with_another_number_of_processes(tmp_path):
    def trained(action: str, processes: int) -> dict:
        out, _ = printed(["-m", "tests.helpers.universal_steps", action, str(tmp_path)], processes)
        return json.loads(out.splitlines()[-1])

    expected = trained("save", 2)
    for case in expected:
        folders = [
            "--input_folder",
            str(tmp_path / case / "half"),
            "--output_folder",
            str(tmp_path / case / "universal"),
        ]
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        convert = ["-m", "deepspeed.checkpoint.ds_to_universal", *folders, *workers, "--inject_missing_state"]
        printed(convert)
    results = trained("load", 1)
    for case, row in expected.items():
        assert results[case]["states"] == row["states"], case
        assert ("exp_avg" in row["states"]) == ("momentum" in case), case  # no memory for what is not used
        for own, other in zip(results[case]["parameters"], row["parameters"], strict=True):
            torch.testing.assert_close(torch.tensor(own), torch.tensor(other), rtol=0, atol=2e-6)
