"""The evaluation of a run's policies on its held-out demonstrations."""

import json

import pytest

from irlfast.common.files import InputError
from irlfast.config import make_config
from tests.helpers.runs import run

GIVEN = {"dataset_name": __file__, "model_name_or_path": "."}


def test_with_eval_every_stage_false_only_the_first_and_the_last_policy_are_evaluated(tmp_path):
    output = tmp_path / "run"
    out, _ = run(output, eval_every_stage="false", stages=3, sft_steps=1, inner_steps=1, max_train_samples=24)
    assert sorted(path.parent.name for path in output.glob("*/eval.json")) == ["sft", "stage-02"]
    assert (output / "stage-01" / "policy").exists()
    assert json.loads((output / "final" / "policy.json").read_text())["kept"] == "stage-02"
    assert "stage-01" not in out
    assert "eval.json is missing" not in (output / "report.html").read_text()


def test_keep_best_needs_the_evaluation_of_every_stage():
    with pytest.raises(InputError, match="keep: found 'best' with eval_every_stage false"):
        make_config(GIVEN | {"keep": "best", "eval_every_stage": False})
    assert make_config(GIVEN | {"keep": "best"}).eval_every_stage
