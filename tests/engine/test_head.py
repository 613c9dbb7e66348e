"""ZeRO-3 gathers the head once per step, whatever the number of micro-batches, and the steps stay the same."""

import json

import torch

from tests.helpers.head_gathers import MICRO
from tests.helpers.runs import printed
from tests.helpers.tiers import full


@full
def test_zero_3_gathers_the_head_once_per_step_and_trains_to_the_same_weights(tmp_path):
    out, _ = printed(["-m", "tests.helpers.head_gathers", str(tmp_path)], 2)
    results = json.loads(out.splitlines()[-1])
    assert len(results) == 3
    for case, both in results.items():
        kept, before = both["kept"], both["before"]
        print(f"{case}: {kept['gathers']} gathers in steps of {MICRO} micro-batches, before {before['gathers']}")
        assert kept["gathers"] == [1] * len(MICRO), case
        assert all(count > micro for count, micro in zip(before["gathers"], MICRO, strict=True)), case
        torch.testing.assert_close(torch.tensor(kept["losses"]), torch.tensor(before["losses"]), rtol=1e-6, atol=1e-6)
        for name, weights in kept["weights"].items():
            both_weights = torch.tensor(weights), torch.tensor(before["weights"][name])
            torch.testing.assert_close(*both_weights, rtol=1e-6, atol=1e-6, msg=f"{case}: {name}")
