"""Models that ZeRO-3 has split give the scores of whole models, whatever number of prompts each process has."""

import json

import pytest

from tests.helpers.runs import printed
from tests.helpers.tiers import full, slow


@pytest.mark.parametrize("processes", [pytest.param(2, marks=full), pytest.param(4, marks=slow)])
def test_split_models_score_as_whole_ones_and_no_process_holds_them_whole(tmp_path, processes):
    out, _ = printed(["-m", "tests.helpers.split_scores", str(tmp_path)], processes)
    found = json.loads(out.splitlines()[-1])
    assert found["reused"] <= 1e-6
    assert len(found["scores"]) == 6
    for case, (gaps, prompts, passes, most) in found["scores"].items():
        print(f"{case}: prompts {prompts}, most parameters held", *(f"{share:.2f}" for share in most))
        assert max(gaps) <= 1e-4, case
        assert sum(prompts) == int(case[-1]), case
        assert len(set(passes)) == 1, case
        assert max(most) < 1 / processes + 0.1, case
    assert 0 in found["scores"]["plain, 1"][1]
