"""An evaluation whose files are damaged ends with the same figures, or says why not."""

import random
import shutil
from pathlib import Path

import pytest

from irlfast.common.artefacts import MANIFEST
from tests.helpers.faults import FAULTS, artefacts, restore, strike
from tests.helpers.runs import ROOT, ended, printed
from tests.helpers.tiers import full_then_slow, slow


@pytest.fixture(scope="module")
def evaluation(finished, tmp_path_factory):
    """The command of an evaluation of two policies, its folder, and a copy to start again from."""
    output = tmp_path_factory.mktemp("damaged") / "evaluation"
    models = [str(finished[0] / name) for name in ("sft/policy", "final")]
    keys = ["num_generations=2", "max_eval_samples=6", f"output_dir={output}"]
    arguments = ["-m", "irlfast.evaluate", *models, "--dataset", str(ROOT / "irlfast/demo/test.jsonl"), *keys]
    printed(arguments)
    return arguments, output, Path(shutil.copytree(output, output.with_name("pristine")))


def outcome(arguments, output, pristine) -> str:
    code, _, err = ended(arguments)
    assert "Traceback" not in err and code in (0, 2), err
    if code == 2:
        assert err.splitlines()[-1].startswith("irlfast: "), err
        return "refused"
    assert (output / "figures.json").read_bytes() == (pristine / "figures.json").read_bytes()
    return "repaired" if (output / "quarantine").exists() or "is missing" in err else "not needed"


@pytest.mark.parametrize("seed", full_then_slow(range(2)))
def test_all_parts_that_are_damaged_at_once_are_made_anew_with_the_same_figures(evaluation, seed):
    _, output, pristine = evaluation
    restore(output, pristine)
    draw = random.Random(seed)
    for path in artefacts(output):
        strike(path, draw.choice(FAULTS), draw, pristine)
    assert outcome(*evaluation) == "repaired"


@slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_file_survives_every_fault_or_is_refused_in_a_sentence(evaluation, fault, draw_of_fault):
    _, output, pristine = evaluation
    for number, path in enumerate([*artefacts(pristine), *sorted(pristine.rglob(MANIFEST))]):
        restore(output, pristine)
        strike(output / path.relative_to(pristine), fault, random.Random(1000 * draw_of_fault + number), pristine)
        print(fault.__name__, path.relative_to(pristine), outcome(*evaluation))
