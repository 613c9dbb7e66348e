"""The pairs of a stage: answers that teach nothing are dropped, and a stage without pairs ends the run."""

import pytest

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.packing import PromptGroup, pack
from irlfast.data.store import Example
from irlfast.methods.stages import make_pairs
from irlfast.runs.run import Run


@pytest.fixture
def run(tmp_path):
    config = make_config({"dataset_name": __file__, "model_name_or_path": "."})
    return Run(config, tmp_path, "initial", None, [], [], None, None)


def examples(*answers: list[int]) -> list[Example]:
    return [Example([7], answer) for answer in answers]  # prompts of one token


def test_empty_and_identical_answers_are_dropped_and_counted(run):
    pairs, counts = make_pairs(run, 0, examples([1, 2], [3, 4], [5]), [[], [3, 4], [6, 2]])
    assert [*pairs] == [PromptGroup([7], ([5], [6, 2]))]
    expected = {"pairs": 1, "dropped_identical": 1, "dropped_empty": 1, "from_history": 0, "synthetic_tokens": 4}
    assert counts == expected
    assert pack(pairs).rows.tolist() == [0, 0, 1]  # a prompt of one token predicts both first tokens


def test_a_stage_without_pairs_ends_in_one_sentence(run):
    with pytest.raises(InputError, match=r"^stage-01: all 2 synthetic answers equal the expert's or are empty"):
        make_pairs(run, 1, examples([1, 2], [3]), [[1, 2], []])
