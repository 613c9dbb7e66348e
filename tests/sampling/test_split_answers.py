"""A policy that ZeRO-3 has split gives the answers of a whole one, whatever number of shards each process has."""

import json

import pytest

from tests.helpers.runs import printed
from tests.helpers.tiers import full, slow


@pytest.mark.parametrize("processes", [pytest.param(2, marks=full), pytest.param(4, marks=slow)])
def test_split_policies_answer_as_whole_ones_and_no_process_holds_them_whole(processes, tmp_path):
    out, _ = printed(["-m", "tests.helpers.split_answers", str(tmp_path)], processes)
    found = json.loads(out.splitlines()[-1])
    for case, (same, answers, *_, shards, most) in found.items():
        print(f"{case}: {answers} answers, shards {shards}, most parameters", *(f"{share:.2f}" for share in most))
        assert same, case
        assert max(most) < 1 / processes + 0.1, case
    assert [each[1] for each in found.values()] == [5, 27, 1, 6]
    assert 0 in found["fewer than processes"][4] and min(found["drawn"][4]) > 0
    assert found["drawn"][2] < found["drawn"][3]
