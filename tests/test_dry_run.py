import pytest

from tests.runs import ROOT, printed, settings


def dry(*given: str, code: int = 0) -> tuple[str, str]:
    return printed(["-m", "irlfast.train", *given, "--dry_run"], code=code)


def test_the_default_shows_examples_with_the_mask_steps_memory_and_time(tmp_path):
    out, _ = dry("configs/irft.yaml", f"output_dir={tmp_path / 'run'}")
    assert out.count("⟦") == 4  # the legend and three examples
    assert out.count("<|endoftext|>⟧") == 3  # the end token is learnt
    assert "prompt tokens + " in out
    for phase in ("sft", "stage-00", "stage-01", "stage-02"):
        assert f"{phase}: " in out
    assert "optimiser steps" in out
    assert "GiB a device" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs").glob("*-*.yaml")))
def test_recipes_are_valid_and_say_what_could_not_be_had(recipe):
    out, err = dry(f"configs/{recipe}")
    assert "not checked: " in out
    assert "stage-00: " in out
    assert "Traceback" not in err


def test_bad_data_is_an_error_here_too(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": 1}\n')
    _, err = dry(*settings(tmp_path / "run", dataset_name=rows), code=2)
    assert "rows.jsonl, line 1: found columns question" in err
