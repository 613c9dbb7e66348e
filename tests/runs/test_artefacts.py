"""Artefacts: what a kill, a fault or another process can do to their manifest, and when their bytes are on the disk."""

import json
import os
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from irlfast.common import artefacts, files
from irlfast.common.artefacts import MANIFEST, checksums, finish_kept, intact, keep, keep_json, keep_text, note
from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.engine import checkpoint
from irlfast.engine.plan import Plan
from irlfast.startup.inputs import keep_inputs, read_inputs


def test_an_artefact_is_intact_as_it_was_kept_and_anything_else_in_its_place_is_set_aside(tmp_path, capsys):
    path = tmp_path / "eval.json"
    assert not intact(path)
    path.write_text("foreign")
    assert not intact(path) and (tmp_path / "quarantine/eval.json").read_text() == "foreign"
    keep_json(path, [1])
    assert intact(path)
    path.write_text("[2]\n")
    assert not intact(path) and not path.exists()
    assert [each.name for each in sorted((tmp_path / "quarantine").iterdir())] == ["eval.json", "eval.json.1"]
    keep_json(path, [1])
    path.unlink()
    assert not intact(path)
    said = capsys.readouterr().err
    assert [said.count(why) for why in ("is not of this run", "is not as it was written", "is missing")] == [1, 1, 1]


def test_a_folder_with_a_file_more_is_not_intact(tmp_path):
    keep(tmp_path / "policy", lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")))
    assert intact(tmp_path / "policy")
    (tmp_path / "policy" / "modeling.py").write_text("print(1)")
    assert not intact(tmp_path / "policy")


@pytest.mark.parametrize("older", [None, "older"])
def test_an_artefact_that_a_kill_leaves_between_its_line_and_its_name_gets_its_name(tmp_path, capsys, older):
    path, temporary = tmp_path / "stage-00" / "a", tmp_path / "stage-00" / "a.tmp"
    keep_text(path.with_name("b"), "b")
    if older:
        keep_text(path, older)
    temporary.write_text("whole")
    note(path, checksums(temporary))
    finish_kept(tmp_path)
    assert intact(path) and path.read_text() == "whole" and not temporary.exists()
    assert not (tmp_path / "quarantine").exists() and not capsys.readouterr().err


def test_what_a_kill_leaves_before_its_line_or_a_fault_damages_gets_no_name(tmp_path):
    keep_text(tmp_path / "a", "older")
    (tmp_path / "a.tmp").write_text("half")
    finish_kept(tmp_path)
    assert intact(tmp_path / "a") and (tmp_path / "a").read_text() == "older"
    note(tmp_path / "a", checksums(tmp_path / "a.tmp"))
    (tmp_path / "a.tmp").write_text("fault")
    finish_kept(tmp_path)
    assert (tmp_path / "a").read_text() == "older"


def test_a_line_that_a_kill_or_a_fault_breaks_costs_its_own_artefact_alone(tmp_path):
    for name in "abc":
        keep_text(tmp_path / name, name)
    manifest = tmp_path / MANIFEST
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(lines[0] + lines[1].replace(b'"name"', b'"nome"') + lines[2][:40])
    keep_text(tmp_path / "d", "d")
    assert [intact(tmp_path / name) for name in "abcd"] == [True, False, False, True]


def test_no_bit_of_a_manifest_makes_another_content_intact(tmp_path):
    other = tmp_path / "a.json"
    keep_text(other, "as it was")
    whole = (tmp_path / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / MANIFEST).write_bytes(flipped)
        other.write_text("as it is!")
        finish_kept(tmp_path)
        assert not intact(other), bit


NAMES = ["", ".", "..", "a/b", "../a", "/a", "a\0b", "\ud800", "n" * 5000, 7, None, ["a"], {}]
FILES = [None, 7, "a", [], {"a": None}, {"a": 7}]


@pytest.mark.parametrize(
    "entry",
    [*({"name": name, "files": {}} for name in NAMES), *({"name": "a", "files": each} for each in FILES), 7, None, []],
)
def test_a_line_of_json_that_names_no_file_of_its_folder_counts_as_none(tmp_path, entry):
    keep_text(tmp_path / "kept", "kept")
    with (tmp_path / MANIFEST).open("a") as manifest:
        manifest.write(json.dumps(entry) + "\n")
    finish_kept(tmp_path)
    assert intact(tmp_path / "kept") and not intact(tmp_path / "a")


def test_processes_that_note_artefacts_at_once_lose_none(tmp_path):
    def keep_some(first: int) -> None:
        for number in range(first, 200, 8):
            keep_text(tmp_path / f"{number}", "x" * number)

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(keep_some, range(8))]
    assert all(intact(tmp_path / f"{number}") for number in range(200))


def test_another_content_is_refused_where_it_may_not_change(tmp_path):
    keep_text(tmp_path / "rows", "a", "other rows")
    keep_text(tmp_path / "rows", "a", "other rows")
    (tmp_path / "rows").unlink()
    with pytest.raises(InputError, match="other rows"):
        keep_text(tmp_path / "rows", "b", "other rows")
    keep_text(tmp_path / "rows", "a", "other rows")


@pytest.fixture
def events(monkeypatch):
    """Return the list that tells, in order, which files are flushed, renamed and removed."""
    told: list[tuple] = []
    named: dict[int, str] = {}
    real_open, real_fsync, real_replace, real_remove = os.open, os.fsync, os.replace, checkpoint.remove

    def opened(path, *arguments, **options):
        handle = real_open(path, *arguments, **options)
        named[handle] = os.path.basename(path)
        return handle

    monkeypatch.setattr(files.os, "open", opened)
    monkeypatch.setattr(
        files.os, "fsync", lambda handle: (told.append(("flush", named.pop(handle, MANIFEST))), real_fsync(handle))
    )
    monkeypatch.setattr(files.os, "replace", lambda a, b: (told.append(("rename", b.name)), real_replace(a, b)))
    monkeypatch.setattr(checkpoint, "remove", lambda path: (told.append(("remove", path.name)), real_remove(path)))
    return told


def test_the_older_checkpoint_goes_only_when_all_of_the_newer_is_on_the_disk(tmp_path, monkeypatch, events):
    files = [(name, {"x": torch.ones(1)}) for name in ("a.safetensors", "b.safetensors")]
    monkeypatch.setattr(checkpoint, "state_files", lambda _: files)
    engine = types.SimpleNamespace(module=types.SimpleNamespace(teacher=None))
    plan = Plan(None, [np.arange(8)], 8, 1e-3, "rmsprop")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for step in (2, 4):
        events.clear()
        checkpoint.save_checkpoint(engine, folder, {"step": step}, {}, plan)
    at = {event: number for number, event in enumerate(events)}
    renamed = at["rename", "step-4"]
    written = ("a.safetensors", "b.safetensors", "progress.json", "step-4.tmp", MANIFEST)
    assert all(at["flush", name] < renamed for name in written)
    assert renamed < at["flush", "checkpoint"] < at["remove", "step-2"]
    assert checkpoint.last_progress(folder) == {"step": 4, "processes": 1, "step_size": 8}


def test_a_damaged_checkpoint_gives_way_to_an_older_one_and_then_to_none(tmp_path, capsys):
    for step in (2, 10):
        folder = tmp_path / f"step-{step}.tmp"
        folder.mkdir()
        (folder / "progress.json").write_text(f'{{"step": {step}, "processes": 1}}')
        artefacts.keep_staged(folder, tmp_path / f"step-{step}")
    assert checkpoint.last_progress(tmp_path)["step"] == 10
    (tmp_path / "step-10/progress.json").write_text('{"step": 12, "processes": 1}')
    assert checkpoint.last_progress(tmp_path)["step"] == 2
    (tmp_path / "step-2/progress.json").write_bytes(b"")
    assert checkpoint.last_progress(tmp_path) == {}
    assert "starts anew: none of its checkpoints is intact" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_value_that_is_not_finite_is_not_written(tmp_path, monkeypatch, value):
    state = {"a.weight": torch.ones(3), "b.weight": torch.tensor([1.0, value])}
    monkeypatch.setattr(checkpoint, "gather_state", lambda engine, trained_only: state)
    engine = types.SimpleNamespace(module=types.SimpleNamespace(model=torch.nn.Module()))
    config = make_config({"dataset_name": __file__, "model_name_or_path": "."})
    with pytest.raises(InputError, match=r"stage-01: b\.weight \(of 1 tensors\) is not finite .* no policy is written"):
        checkpoint.save_model(engine, "start", tmp_path / "stage-01" / "policy", None, None, config)
    assert not (tmp_path / "stage-01").exists()


def test_an_input_that_changes_while_a_run_is_stopped_is_refused_by_name(tmp_path):
    model, settings, reward = tmp_path / "model", tmp_path / "ds.json", tmp_path / "reward.py"
    weights = model / "model.safetensors"
    model.mkdir()
    for path in (weights, model / "config.json", model / "notes.md", settings, reward):
        path.write_text("{}")
    keys = {"method": "rft", "reward_data": "none", "reward_function": [f"{reward}:f"], "deepspeed": str(settings)}
    config = make_config({"dataset_name": __file__, "model_name_or_path": str(model), **keys})
    output = tmp_path / "run"
    keep_inputs(read_inputs(config, output), output)
    (model / "notes.md").write_text("no input")
    os.utime(settings)
    keep_inputs(read_inputs(config, output), output)
    settings.write_text('{"zero_optimization": {}}')  # what it says of memory may change
    keep_inputs(read_inputs(config, output), output)
    for path in (weights, reward, model / "tokenizer.json"):
        before = path.read_text() if path.exists() else None
        path.write_text("[]")
        with pytest.raises(InputError, match=rf"{path} is not as it was when the run in"):
            read_inputs(config, output)
        path.write_text(before) if before else path.unlink()
    (output / "inputs.json").unlink()
    with pytest.raises(InputError, match=r"inputs\.json: is missing or damaged"):
        keep_inputs(read_inputs(config, output), output)  # the files above have other times now
