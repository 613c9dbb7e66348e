"""A run whose files are damaged between a kill and the next start ends with the same model, or says why not."""

import itertools
import random
import shutil
from pathlib import Path

import pytest

from irlfast.common.artefacts import MANIFEST
from tests.helpers.faults import FAULTS, artefacts, restore, strike
from tests.helpers.runs import command, contents, ended, run_killed_at
from tests.helpers.tiers import slow

KILLED_AT = "stage-01/checkpoint/step-2"
SHARES = 16  # of the product of faults and artefacts, in drawn order: each is a sample of the whole


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed in its second stage, and a copy to start again from."""
    output = tmp_path_factory.mktemp("killed") / "run"
    run_killed_at(output, [KILLED_AT])
    return output, Path(shutil.copytree(output, output.with_name("pristine")))


def outcome(output: Path, whole: Path) -> str:
    """Start the run again: it must end with the bytes of the undisturbed run, or with one sentence."""
    code, _, err = ended(command(output))
    assert "Traceback" not in err and code in (0, 2), err
    if code == 2:
        assert err.splitlines()[-1].startswith("irlfast: "), err
        assert not (output / "final").exists()
        return "refused"
    assert contents(output / "final") == contents(whole / "final")
    return "repaired" if (output / "quarantine").exists() or "is missing" in err else "not needed"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=slow) for seed in range(1, 4))])
def test_all_artefacts_that_are_damaged_at_once_are_made_anew_with_the_same_result(killed, finished, seed):
    output, pristine = killed
    restore(output, pristine)
    draw = random.Random(seed)
    for path in artefacts(output):
        if path.exists():  # the folder around it may be gone by now
            strike(path, draw.choice(FAULTS), draw, pristine)
    assert outcome(output, finished[0]) == "repaired"
    assert (output / "quarantine").is_dir()


@slow
@pytest.mark.parametrize("share", range(SHARES))
def test_every_artefact_survives_every_fault_or_is_refused_in_a_sentence(killed, finished, share, draw_of_fault):
    output, pristine = killed
    paths = [*artefacts(pristine), *sorted(pristine.rglob(MANIFEST))]
    strikes = [*itertools.product(FAULTS, enumerate(paths))]
    draw = random.Random(draw_of_fault)
    for fault, (number, path) in draw.sample(strikes, len(strikes))[share::SHARES]:
        restore(output, pristine)
        strike(output / path.relative_to(pristine), fault, random.Random(1000 * draw_of_fault + number), pristine)
        print(fault.__name__, path.relative_to(pristine), outcome(output, finished[0]), flush=True)


def test_a_checkpoint_has_tensors_and_json_alone(killed):
    files = [path for path in (killed[1] / KILLED_AT).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
