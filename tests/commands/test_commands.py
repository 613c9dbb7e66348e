"""The console command: every subcommand by name, recipes from any folder, and progress with and without a terminal."""

import re
import subprocess
import sys

import pytest

from irlfast.__main__ import COMMANDS, main
from irlfast.common.messages import Progress
from irlfast.config import load_config
from irlfast.config.recipes import recipes
from tests.helpers.runs import ROOT


def said(monkeypatch, capsys, *given: str, code: int = 0) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["irlfast", *given])
    assert main() == code
    return capsys.readouterr()


def test_without_a_command_irlfast_lists_every_command(monkeypatch, capsys):
    alone, asked = said(monkeypatch, capsys)[0], said(monkeypatch, capsys, "--help")[0]
    assert alone == asked
    assert [line.split()[0] for line in alone.splitlines() if line.startswith("  ")] == [*COMMANDS]


def test_a_wrong_command_gets_the_nearest_name(monkeypatch, capsys):
    assert said(monkeypatch, capsys, "trian", code=2)[1] == "irlfast: found no command 'trian'; did you mean train?\n"
    assert "expected one of train, plan, bon" in said(monkeypatch, capsys, "xyz", code=2)[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["irlfast", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"usage: irlfast {name}")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_every_recipe_is_listed_with_a_sentence_printed_and_trained_by_name(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    listed = said(monkeypatch, capsys, "recipes")[0].splitlines()
    [line] = [line for line in listed if line.split()[:1] == [name]]
    assert line.endswith(".")
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    if "load_in_4bit" in text:
        pytest.importorskip("bitsandbytes")
    assert said(monkeypatch, capsys, "recipes", name)[0] == text
    named = load_config([name])[0]
    assert named == load_config([str(ROOT / "configs" / f"{name}.yaml")])[0]
    assert f"output_dir: {named.output_dir}\n" in text


def test_a_file_wins_over_a_recipe_and_a_wrong_name_gets_the_nearest_recipe(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    wrong = "irlfast: irtf: found neither a file nor a recipe of this name; did you mean irft?\n"
    for command in ("train", "recipes"):
        assert said(monkeypatch, capsys, command, "irtf", code=2)[1] == wrong
    (tmp_path / "irft").write_text(recipes()["irft"].read_text().replace("seed: 0", "seed: 7"))
    assert load_config(["irft"])[0].seed == 7


def test_the_listing_and_the_version_import_nothing_heavy():
    code = (
        "import sys\nfrom irlfast.__main__ import main\n"
        "for given in (['--version'], ['recipes'], []):\n    sys.argv = ['irlfast', *given]\n    assert main() == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ([\S ]+?): (\w+) (\d+)/(\d+)(?:, (.+))?")


def test_without_a_terminal_there_is_a_line_per_logging_step_and_no_bar(finished):
    err = finished[2]
    assert "\r" not in err and "%|" not in err
    lines = [match.groups() for match in map(LINE.fullmatch, err.splitlines()) if match]
    steps = [(phase, int(done), int(total)) for phase, unit, done, total, _ in lines if unit == "step"]
    trained = [("stage-00", 2, 4), ("stage-00", 4, 4), ("stage-01", 2, 4), ("stage-01", 4, 4)]
    assert steps == [("sft", 2, 6), ("sft", 4, 6), ("sft", 6, 6), *trained]
    assert all("loss" in metrics for _, unit, _, _, metrics in lines if unit == "step")
    wholes = {(phase, unit) for phase, unit, done, total, _ in lines if done == total}
    assert {("stage-00/greedy, stage-01/samples", "answer"), ("stage-01/reference", "prompt")} <= wholes


def test_lines_of_progress_are_far_apart_except_the_last_one(capsys):
    with Progress("scoring", 5, "row", seconds=1000.0) as progress:
        for _ in range(5):
            progress.advance()
            progress.show()
    [line] = capsys.readouterr().err.splitlines()
    assert LINE.fullmatch(line).groups() == ("scoring", "row", "5", "5", None)


def test_a_terminal_gets_a_bar_and_one_line_when_the_phase_ends(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("sft", 2, "step") as progress:
        progress.advance(1)
        progress.show("loss 2")
        progress.advance(1)
        progress.show("loss 1")
        during = capsys.readouterr().err
    assert not LINE.search(during)
    [line] = LINE.findall(capsys.readouterr().err)
    assert line == ("sft", "step", "2", "2", "loss 1")
