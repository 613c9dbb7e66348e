import os
import subprocess
import sys

import pytest

from tests.runs import ROOT, command


def dry(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "irlfast.train", *arguments, "--dry_run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_default_shows_examples_with_the_mask_steps_memory_and_time(tmp_path):
    shown = dry("configs/irft.yaml", f"output_dir={tmp_path / 'run'}")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("⟦") == 4  # the legend and three examples
    assert shown.stdout.count("<|endoftext|>⟧") == 3  # the end token is learnt
    assert "prompt tokens + " in shown.stdout
    for phase in ("sft", "stage-00", "stage-01", "stage-02"):
        assert f"{phase}: " in shown.stdout
    assert "optimiser steps" in shown.stdout
    assert "GiB a device" in shown.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs").glob("*-*.yaml")))
def test_recipes_are_valid_and_say_what_could_not_be_had(recipe):
    shown = dry(f"configs/{recipe}")
    assert shown.returncode == 0, shown.stderr
    assert "not checked: " in shown.stdout
    assert "stage-00: " in shown.stdout
    assert "Traceback" not in shown.stderr


def test_bad_data_is_an_error_here_too(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": 1}\n')
    shown = dry(*command(tmp_path / "run", dataset_name=rows)[2:])
    assert shown.returncode == 2
    assert "rows.jsonl, line 1: found columns question" in shown.stderr
