"""A policy that ZeRO-3 splits while it is loaded: what a process holds of it, and what is still checked."""

import json

import pytest

from tests.helpers.runs import TORCHRUN, printed
from tests.helpers.tiers import full


@full
def test_no_process_holds_a_policy_that_zero_3_splits_while_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back at once, and is resident no more
    out, err = printed(["-m", "tests.helpers.split_load", str(tmp_path)], TORCHRUN)
    results = json.loads(out.splitlines()[-1])
    shares = [peak / results["whole"] for peak in results["peaks"]]
    print("peak of each process, of the whole model:", *(f"{share:.3f}" for share in shares))
    assert len(shares) == 2 and all(0.4 < share < 0.6 for share in shares)
    assert results["differences"] == pytest.approx(dict.fromkeys(("plain", "tied", "bfloat16", "LoRA"), 0.0), abs=1e-6)
    for name, reason in (("nan", "is not finite; expected finite weights"), ("missing", "(1 tensors missing)")):
        assert all(reason in each for each in results["refusals"][name]), name
    assert "missing: each process loads it whole, because its checkpoint has no" in err
