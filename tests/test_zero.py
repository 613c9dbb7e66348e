"""FusedRMSprop under DeepSpeed: every ZeRO stage, ZeRO-Offload, universal checkpoints, one process and two."""

import json
import sys

import pytest
import torch

from tests.runs import TORCHRUN, start


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["one process", "two"])
def test_steps_are_pytorchs_at_every_zero_stage_with_the_optimiser_offloaded_or_not(tmp_path, launcher):
    process = start(["-m", "tests.zero_steps", str(tmp_path)], launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    assert len(found) == 8
    for case, row in found.items():
        assert row["error"] < 2e-6, case  # parameters are up to 0.3, and steps start at 1e-2
        assert {state.split()[0] for state in row["state"]} == {"torch.float32"}, case
        assert "offload cpu" not in case or "ZeRO 0" in case or row["state"] == ["torch.float32 on cpu"], case


def output(arguments: list[str], launcher: tuple[str, ...]) -> str:
    process = start(arguments, launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def test_universal_checkpoints_go_on_with_another_number_of_processes(tmp_path):
    def trained(action: str, launcher: tuple[str, ...]) -> dict:
        return json.loads(output(["-m", "tests.universal_steps", action, str(tmp_path)], launcher).splitlines()[-1])

    expected = trained("save", TORCHRUN)
    for case in expected:
        folders = [
            "--input_folder",
            str(tmp_path / case / "half"),
            "--output_folder",
            str(tmp_path / case / "universal"),
        ]
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        convert = ["-m", "deepspeed.checkpoint.ds_to_universal", *folders, *workers, "--inject_missing_state"]
        output(convert, (sys.executable,))
    found = trained("load", (sys.executable,))
    for case, row in expected.items():
        assert found[case]["states"] == row["states"], case
        assert ("exp_avg" in row["states"]) == ("momentum" in case), case  # no memory for what is not used
        for own, other in zip(found[case]["parameters"], row["parameters"], strict=True):
            torch.testing.assert_close(torch.tensor(own), torch.tensor(other), rtol=0, atol=2e-6)
