"""The bytes that a run is estimated to write are those that it writes, and too little room is said at the start."""

import shutil

import pytest
import yaml

from irlfast.common import files
from irlfast.common.artefacts import keep_json
from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.store import load_examples
from irlfast.engine.fit import fit
from irlfast.engine.plan import plan_phase
from irlfast.losses.sft import sft_loss
from irlfast.methods import METHODS
from irlfast.runs.run import Run
from irlfast.startup.disk import Need, check_room, checkpoint_bytes, disk_needs, most
from irlfast.startup.sizes import Size, mean_length, model_size
from tests.helpers.runs import DEMO, run, run_killed_at
from tests.helpers.tiers import full, full_then_slow


def needs_of(output):
    """Estimate the needs of the run in a folder, and return them with its configuration and its model's size."""
    config = make_config(yaml.safe_load((output / "config.yaml").read_text()))
    train, size = load_examples(output / "data/train.safetensors"), model_size(config, config.train_tokenizer)
    return disk_needs(config, size, mean_length(train), len(train), 0), config, size


def bytes_below(folder):
    """The bytes of the files of a folder on disk: a file with several names counts once."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({(each.st_dev, each.st_ino): each.st_size for each in found}.values())


def check_left(output):
    needs, *_ = needs_of(output)
    for name in {need.phase.partition("/")[0] for need in needs[:-1]}:
        left = sum(need.left for need in needs if need.phase.partition("/")[0] == name)
        assert left == pytest.approx(bytes_below(output / name), rel=0.1), name
    built = bytes_below(output / "initial")
    assert sum(need.left for need in needs) + built == pytest.approx(bytes_below(output), rel=0.1)


def test_the_estimate_of_a_run_is_within_a_tenth_of_what_it_leaves(finished):
    check_left(finished[0])


OTHERS = [
    {"method": "rft", "sft_steps": 0, "stages": 1, "num_generations": 2, "reward_steps": 2, "inner_steps": 2},
    {"use_peft": "true", "sft_steps": 0, "stages": 2},
    {"dtype": "bfloat16", "optim": "adamw_torch", "stages": 1},
]


@pytest.mark.parametrize("keys", full_then_slow(OTHERS, 2), ids=["rft", "lora", "bfloat16"])
def test_the_estimate_holds_for_other_methods_and_types(tmp_path, keys):
    run(tmp_path / "run", **DEMO | keys)
    check_left(tmp_path / "run")


@pytest.mark.parametrize("keys", [{}, pytest.param({"dtype": "bfloat16", "sft_optim": "rmsprop"}, marks=full)])
def test_the_estimate_of_a_checkpoint_is_within_a_tenth_of_its_size(tmp_path, keys):
    run_killed_at(tmp_path / "run", ["sft/checkpoint/step-2"], **keys)
    needs, config, size = needs_of(tmp_path / "run")
    [sft, *_] = METHODS[config.method].phases(config, 96)
    checkpoint = bytes_below(tmp_path / "run/sft/checkpoint/step-2")
    assert checkpoint_bytes(sft.plan(), size) == pytest.approx(checkpoint, rel=0.1)
    assert needs[0].work == pytest.approx(2 * checkpoint, rel=0.1)  # the second of two replaces the first


def test_too_little_room_is_said_with_the_phase_and_what_needs_less(finished, tmp_path, monkeypatch):
    output = finished[0]
    needs, *_ = needs_of(output)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    check_room(output, needs[:-1])  # all phases are done
    with pytest.raises(InputError, match=r"1\.0 MB are free, but .* of them during sft; expected more room, or a"):
        check_room(tmp_path, needs)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, most(needs)))
    check_room(tmp_path, needs)


def test_room_is_checked_before_each_phase_trains_but_not_for_one_that_is_done(tmp_path):
    asked = []

    def full():
        asked.append(True)
        raise InputError("no room")

    config = make_config({"dataset_name": __file__, "model_name_or_path": "."})
    run = Run(config, tmp_path, "initial", None, [], [], None, None, check_room=full)
    plan = plan_phase(config, 8, stage=0, epochs=None, steps=1, learning_rate=1e-6, optim="rmsprop", seed=[0])
    folder = tmp_path / "stage-00" / "round-00"
    with pytest.raises(InputError, match=r"^no room$"):
        fit(run, folder, "initial", [], sft_loss, plan)
    (folder / "policy").mkdir(parents=True)
    keep_json(folder / "DONE", [])
    assert fit(run, folder, "initial", [], sft_loss, plan) == folder / "policy"
    assert len(asked) == 1


def test_a_run_whose_disk_fills_in_a_phase_ends_before_the_next_one(tmp_path, monkeypatch):
    from irlfast import train

    class Reached(Exception):
        pass

    def stage_of_a_run(run, *_):
        with pytest.raises(InputError, match=r"0\.0 MB are free, but the run has up to"):
            run.check_room()
        raise Reached

    config = make_config({"dataset_name": __file__, "model_name_or_path": ".", "output_dir": str(tmp_path)})
    run = Run(config, tmp_path, "initial", None, [], [], None, None)
    monkeypatch.setattr("irlfast.startup.prepare.prepare", lambda config: run)
    monkeypatch.setattr("irlfast.startup.time_plan.plan_time", lambda run: None)
    monkeypatch.setattr("irlfast.startup.disk.plan_disk", lambda run: [Need("sft", 10**6, 10**6)])
    monkeypatch.setattr("irlfast.methods.sft.sft", stage_of_a_run)
    monkeypatch.setattr("irlfast.methods.stages.wants_sft", lambda config: True)
    free = iter([10**9, 0])  # at the start of the run, and when its first phase trains
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, next(free)))
    with pytest.raises(Reached):
        train.train(config)


def test_final_takes_the_room_of_its_weights_without_links_and_for_a_merged_adapter(tmp_path, monkeypatch):
    keys, size = {"dataset_name": __file__, "model_name_or_path": "."}, Size(10**6, 10**6, layers=1, hidden=1)
    whole, adapter = make_config(keys), make_config(keys | {"use_peft": True})
    linked, copied, merged = (
        disk_needs(config, size, 20.0, 96, 0, links)[-1].left
        for config, links in ((whole, True), (whole, False), (adapter, True))
    )
    assert copied - linked == 4 * 10**6 and merged == copied
    assert files.has_links(tmp_path)
    monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert not files.has_links(tmp_path) and not [*tmp_path.iterdir()]


def test_policies_that_save_total_limit_deletes_count_no_longer():
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "stages": 5, "dtype": "bfloat16"}
    size = Size(parameters=10**9, trained=10**9, layers=1, hidden=1)
    every, two = (disk_needs(make_config(keys | more), size, 20.0, 96, 0) for more in ({}, {"save_total_limit": 1}))
    left, at_most = (measure(every) - measure(two) for measure in (lambda needs: sum(n.left for n in needs), most))
    assert left == pytest.approx(3 * 10**9 * 2, rel=0.01)  # of five in bfloat16, the last and the best stay
    assert at_most == pytest.approx(2 * 10**9 * 2, rel=0.01)  # the last stage deletes the third one when it is done
