"""Others' reward models that ZeRO-3 splits give the scores of whole ones, and no process holds them whole."""

import json
import sys

import pytest

from tests.helpers.runs import PORT, printed
from tests.helpers.tiers import full, slow

MODULE = ["-m", "tests.helpers.split_rewards"]


@pytest.mark.parametrize("processes", [pytest.param(2, marks=full), pytest.param(4, marks=slow)])
def test_split_reward_models_of_others_score_as_whole_ones(processes, tmp_path):
    out, err = printed([*MODULE, str(tmp_path), "gaps"], processes)
    gaps = json.loads(out.splitlines()[-1])
    assert "loads it whole" not in err
    assert len(gaps) == 4
    for case, found in gaps.items():
        print(f"{case}: largest difference of a score {max(found):.1e}")
        assert len(found) == processes and max(found) <= 1e-4, case


@slow
@pytest.mark.parametrize("processes", [2, 4])
def test_no_process_holds_a_split_reward_model_of_others(processes, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back at once, and is resident no more
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *PORT)
    out, _ = printed([*MODULE, str(tmp_path), "peaks"], launcher)
    found = json.loads(out.splitlines()[-1])
    shares = [peak / found["whole"] for peak in found["peaks"]]
    print("peak of each process, of the whole model:", *(f"{share:.3f}" for share in shares))
    assert len(shares) == processes and all(share < 1 / processes + 0.1 for share in shares)
