"""A run whose processes torchrun starts anew when one is killed."""

from tests.helpers.killable import Start, until
from tests.helpers.runs import command, contents, run
from tests.helpers.tiers import full

SHORT = {"stages": 1, "max_train_samples": 32, "max_eval_samples": 8, "sft_steps": 4, "zero_stage": 2}
PATIENCE = 300.0  # seconds


@full
def test_a_run_that_torchrun_starts_anew_after_kills_ends_with_the_bytes_of_an_undisturbed_one(tmp_path):
    run(tmp_path / "whole", 2, **SHORT)
    output = tmp_path / "restarted"
    start = Start("2 processes", command(output, **SHORT), tmp_path / "start", restarts=2)
    try:
        for killed, moment in enumerate(("sft/checkpoint/step-2", "stage-00/checkpoint/step-2")):
            assert until((output / moment).exists, PATIENCE), start.printed()
            start.ranks()[killed].kill()
        assert until(lambda: start.code() is not None, PATIENCE), start.printed()
    finally:
        start.clear()
    assert start.code() == 0, start.printed()
    assert contents(output / "final") == contents(tmp_path / "whole" / "final")
    assert start.printed().count("ended without a word (killed?)") == 2
