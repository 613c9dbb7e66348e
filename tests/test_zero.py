"""FusedRMSprop under DeepSpeed: every ZeRO stage, ZeRO-Offload, one process and two."""

import json
import sys

import pytest

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
