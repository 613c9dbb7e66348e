"""Checkpoints that a thread writes beside training: the bytes of their moment, one at a time, and no error is lost."""

import json
import threading
import time
import types

import psutil
import pytest
import torch

from irlfast.common.stop import Preempted
from irlfast.engine import saving as module
from irlfast.engine.saving import Saving, begin, check, finish, saving_beside
from tests.helpers.runs import printed
from tests.helpers.tiers import full, slow

FULL = OSError(28, "No space left on device")


def begun(write, tensors=None):
    """A checkpoint in work, which ``write`` writes."""
    saving = Saving("sft", beside=True)
    begin(saving, 2, [("a", tensors or {"x": torch.ones(3)})], write)
    return saving


def fails(_):
    raise FULL


def test_a_copy_has_the_values_dtypes_and_shapes_of_its_moment(tmp_path):
    tensors = {"step": torch.tensor([5.0]), "none": torch.zeros(0), "sum": torch.tensor(2.0, dtype=torch.float64)}
    tensors |= {"weights": torch.randn(3, 5), "half": torch.randn(7).bfloat16(), "part": torch.arange(9)[2:5]}
    before = {name: values.clone() for name, values in tensors.items()}
    go, written = threading.Event(), {}
    saving = begun(lambda files: written.update(dict(files)["a"]) if go.wait(60) else None, tensors)
    for values in tensors.values():
        values.zero_().sub_(1)
    check(saving)
    go.set()
    finish(saving)
    assert written.keys() == before.keys()
    for name, values in before.items():
        assert written[name].dtype == values.dtype and written[name].is_contiguous()
        assert torch.equal(written[name], values) and written[name].shape == values.shape


def test_the_next_checkpoint_waits_and_a_line_tells_for_how_long(capsys, monkeypatch):
    monkeypatch.setattr(module, "LONG", 0.05)
    saving, order = begun(lambda _: (time.sleep(0.2), order.append("written"))), []
    finish(saving)
    assert order == ["written"] and saving.written is None
    assert capsys.readouterr().err.startswith("sft waited 0.") and not finish(saving)
    assert capsys.readouterr().err == ""


def test_an_error_of_the_thread_is_raised_before_the_next_step_and_at_the_end():
    saving = begun(fails)
    with pytest.raises(OSError, match="No space left"):
        while True:
            check(saving)
    with pytest.raises(OSError, match="No space left"):
        finish(saving)
    with pytest.raises(OSError, match="No space left"), saving_beside("sft", wanted=True) as own:
        begin(own, 2, [], fails)


@pytest.mark.parametrize(
    ("ends_by", "raised", "waits"),
    [(ValueError, ValueError, True), (Preempted, OSError, True), (KeyboardInterrupt, KeyboardInterrupt, False)],
)
def test_whatever_ends_a_phase_waits_for_its_checkpoint_but_not_ctrl_c(ends_by, raised, waits):
    """A preemption may not say that a checkpoint is there which is not."""
    go = threading.Event()
    threading.Timer(0.2, go.set).start()
    with pytest.raises(raised), saving_beside("sft", wanted=True) as saving:
        begin(saving, 2, [], lambda _: go.wait(60) and fails(_))
        raise ends_by
    assert go.is_set() == waits
    go.set()


@pytest.mark.parametrize(("available", "beside"), [(100, True), (12, False)])
def test_without_room_for_a_copy_training_waits_and_a_line_says_so(monkeypatch, capsys, available, beside):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=available))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    threads = []
    saving = begun(lambda _: threads.append(threading.current_thread().name), {"x": torch.ones(5)})
    finish(saving)
    assert threads == ["checkpoint" if beside else "MainThread"]
    assert ("training waits while a checkpoint is written" in capsys.readouterr().err) != beside


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (1, ["0 float32", "1 bfloat16"]),
        pytest.param(2, ["1 float32", "2 float32", "3 float32"], marks=full),
        pytest.param(2, ["0 float32", "1 bfloat16", "2 bfloat16", "3 bfloat16"], marks=slow),
    ],
)
def test_steps_go_on_while_a_checkpoint_is_written_that_has_the_bytes_of_one_that_training_waits_for(
    tmp_path, processes, cases
):
    out, _ = printed(["-m", "tests.helpers.held_saves", str(tmp_path), *cases], processes)
    results = json.loads(out.splitlines()[-1])
    assert results.keys() == {*cases}
    for case, result in results.items():
        assert result.pop("files") >= 2 + processes, case
        assert all(result.values()), (case, result)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_copy_has_the_values_of_its_moment_though_training_does_not_wait_for_it():
    values, written = torch.zeros(1 << 24, device="cuda"), []
    for step in (1, 2):  # the first allocates pinned memory
        torch.cuda._sleep(10**9)
        values.fill_(step)
        saving = begun(lambda files: written.append(dict(files)["a"]["x"].clone()), {"x": values})
        busy = not torch.cuda.current_stream().query()
        values.zero_()
        assert values.is_cuda and written[step - 1 :] == []
        finish(saving)
        assert torch.equal(written[-1], torch.full_like(written[-1], step))
    assert busy
