"""Real runs whose checkpoints are slow to write: steps go on meanwhile, and whatever happens then costs no byte."""

import json
import re

from irlfast.common.artefacts import intact
from irlfast.engine.checkpoint import checkpoints
from tests.helpers.runs import contents, ended, run, settings
from tests.helpers.tiers import full, slow


def slow_run(output, processes=1, plan=None, **keys):
    """Return the exit code, and what was printed to stderr, of a run of which ``plan`` says what happens to it."""
    words = ["-m", "tests.helpers.slow_saves", json.dumps(plan or {}), "irlfast.train", *settings(output, **keys)]
    code, _, err = ended(words, processes)
    return code, err


def test_steps_go_on_while_a_checkpoint_is_written_and_change_no_byte(finished, tmp_path):
    output, note = tmp_path / "run", tmp_path / "note"
    code, err = slow_run(output, plan={"note": str(note), "steps": 2})
    assert code == 0, err
    assert json.loads(note.read_text()) == [2, 2, 2, 2]  # sft has 6 steps, and each of two stages has 4
    assert contents(output / "final") == contents(finished[0] / "final")


@full
def test_what_happens_to_a_checkpoint_in_work_is_a_sentence_or_a_kill_and_the_run_resumes(finished, tmp_path):
    output = tmp_path / "run"
    code, err = slow_run(output, plan={"number": 2, "what": "full"})
    assert code == 2 and "Traceback" not in err
    full_disk = rf"irlfast: output_dir {output}: its disk is full; .* are free there, .*; the same command resumes"
    assert re.fullmatch(full_disk, err.splitlines()[-1])
    assert [path.name for path in checkpoints(output / "sft/checkpoint")] == ["step-2"]
    code, err = slow_run(output, plan={"number": 1, "what": "SIGTERM"})
    assert code == 75 and "preempted at step 5 of sft; the same command resumes" in err
    assert [path.name for path in checkpoints(output / "sft/checkpoint")] == ["step-5"]
    code, _ = slow_run(output, plan={"number": 1, "what": "SIGKILL"})
    assert code == -9 and not checkpoints(output / "stage-00/checkpoint")
    assert (output / "stage-00/checkpoint/step-2.tmp").exists()
    code, _ = slow_run(output, plan={"number": 2, "what": "SIGINT"})
    assert code == 130
    run(output, async_save=False)
    assert contents(output / "final") == contents(finished[0] / "final")


@slow
def test_a_checkpoint_counts_when_the_parts_of_both_processes_are_on_the_disk(tmp_path):
    keys = {"zero_stage": 2, "max_train_samples": 32, "max_eval_samples": 8, "stages": 1, "preemption_grace": 10}
    keys |= {"sft_steps": 60, "logging_steps": 20, "save_steps": 20}
    run(tmp_path / "whole", 2, **keys)
    output = tmp_path / "run"
    code, err = slow_run(output, 2, {"number": 2, "what": "full", "rank": 1}, **keys)
    assert code == 2 and "Traceback" not in err
    assert len(re.findall("its disk is full", err)) == 1
    assert [path.name for path in checkpoints(output / "sft/checkpoint")] == ["step-20"]
    code, err = slow_run(output, 2, {"number": 1, "what": "SIGTERM", "rank": 1}, **keys)
    assert code == 75 and re.search(r"preempted at step [45]\d of sft; the same command resumes", err)
    [last] = checkpoints(output / "sft/checkpoint")
    assert intact(last) and len([*last.glob("state-*")]) == 2
    slow_run(output, 2, {"number": 1, "what": "SIGKILL", "rank": 1}, **keys)
    run(output, 2, **keys)
    assert contents(output / "final") == contents(tmp_path / "whole" / "final")
