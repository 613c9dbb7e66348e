"""DeepSpeed still needs every patch, and a patch whose place in DeepSpeed is gone says so and does nothing."""

import datetime
import importlib.metadata
import json
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from torch.utils._python_dispatch import TorchDispatchMode

from irlfast.common.files import InputError
from irlfast.engine import deepspeed_patches as patches
from irlfast.engine.meters import Stopwatch
from tests.helpers.runs import ROOT, printed


def test_deepspeed_still_does_what_the_patches_undo():
    """A failure here, after an upgrade, says which patch to adapt or to delete."""
    out, _ = printed(["-m", "tests.helpers.unpatched"])
    assert json.loads(out.splitlines()[-1]) == {
        "held by the cache": True,
        "held by the stack": True,
        "released": True,
        "dtype of a float32 parameter": "torch.bfloat16",
        "collectives of one process": 1,
        "minutes of groups": [30, 70],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed compiles them for CPUs")
def test_deepspeed_would_compile_its_shared_memory_collectives(monkeypatch):
    builder, loaded = type(get_accelerator().create_op_builder("ShareMemCommBuilder")), []
    monkeypatch.setattr(builder, "load", lambda self: loaded.append(self))
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, builder.NAME, True)
    build_shm_op()
    assert len(loaded) == 1
    patches.skip_shared_memory_collectives()
    build_shm_op()
    assert len(loaded) == 1


def test_no_start_of_a_run_has_deepspeed_try_its_operations_with_a_compiler(monkeypatch):
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", None)
    del deepspeed.ops.__compatible_ops__
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: pytest.fail("it is tried"))
    patches.skip_shared_memory_collectives()
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}


@pytest.fixture
def reported(monkeypatch):
    """The places that were reported as missing."""
    places = []
    monkeypatch.setattr(patches, "report_missing", lambda place, effect: places.append(place))
    return places


def test_a_table_of_operations_that_is_gone_is_reported(monkeypatch, reported):
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", None)
    patches.skip_shared_memory_collectives()
    assert reported == ["deepspeed.ops.__compatible_ops__"]


def test_lists_and_caches_of_zero_3_that_are_gone_are_reported(monkeypatch, reported):
    monkeypatch.delattr(parameter_offload, "FWD_MODULE_STACK")
    monkeypatch.delattr(partitioned_param_coordinator, "PartitionedParameterCoordinator")
    patches.release_zero3_engines()
    assert reported == ["parameter_offload.FWD_MODULE_STACK", "cached method of PartitionedParameterCoordinator"]


def test_a_maker_of_groups_that_is_gone_is_reported(monkeypatch, reported):
    monkeypatch.setattr(comm, "cdb", None)
    patches.give_timeout_to_groups(datetime.timedelta(hours=1))
    assert reported == ["new_group in deepspeed.comm.comm.cdb"]


def test_a_switch_of_the_reduction_that_is_gone_is_reported(reported):
    optimizer = torch.optim.SGD([torch.zeros(1)])
    engine = SimpleNamespace(optimizer=optimizer)
    patches.skip_reduction_of_one_process(engine)
    assert reported == ["engine.enable_backward_allreduce"]
    assert vars(engine) == {"optimizer": optimizer}


def test_a_note_of_the_modules_at_work_on_a_parameter_that_is_gone_is_reported(reported):
    prepared = SimpleNamespace(head_module=torch.nn.Linear(1, 1))
    module = SimpleNamespace(prepared=prepared)
    patches.keep_head_whole(SimpleNamespace(module=module, zero_optimization_stage=lambda: 2))
    assert not reported
    patches.keep_head_whole(SimpleNamespace(module=module, zero_optimization_stage=lambda: 3))
    assert reported == ["ds_active_sub_modules of a parameter"]


def test_no_mode_sees_the_hooks_of_zero_3_and_those_that_are_gone_are_reported(reported):
    seen = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    hooks = SimpleNamespace(pre_sub_module_forward_function=torch.ones)
    patches.gather_unseen(SimpleNamespace(optimizer=SimpleNamespace(parameter_offload=hooks)))
    parts = ("pre_sub_module_backward", "post_sub_module_forward", "post_sub_module_backward")
    assert reported == [f"parameter_offload.{part}_function" for part in parts]
    with Note():
        assert len(hooks.pre_sub_module_forward_function(2)) == 2 and not seen
        torch.ones(2)
        assert seen


def test_collectives_that_are_gone_are_reported_and_the_others_are_timed(monkeypatch, reported):
    class Backend:
        """DeepSpeed's, but for ``broadcast``."""

    for name in patches.COLLECTIVES:
        if name != "broadcast":
            setattr(Backend, name, lambda self: None)
    backend, watch = Backend(), Stopwatch()
    monkeypatch.setattr(comm, "cdb", backend)
    with patches.timed_collectives(watch):
        backend.all_reduce()
    assert reported == ["broadcast in deepspeed.comm.comm.cdb"]
    assert len(watch.collectives) == 1
    assert not vars(backend)


def test_the_report_is_one_line_with_both_versions_and_the_effect(capsys):
    for _ in range(2):
        patches.report_missing("place", "steps are slower")
    assert capsys.readouterr().err == (
        f"warning: DeepSpeed {deepspeed.__version__} has no place ({patches.TRIED_WITH}); steps are slower\n"
    )


@pytest.mark.parametrize(("version", "line"), [("0.19.8", ""), ("0.20.0", "is newer than the one tried")])
def test_a_newer_deepspeed_than_the_one_tried_is_named_in_one_line(monkeypatch, capsys, version, line):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    patches.check_version()
    patches.check_version()
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == bool(line)


def test_an_older_deepspeed_than_the_one_tried_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.19.7")
    with pytest.raises(InputError, match=r"DeepSpeed 0\.19\.7 is too old"):
        patches.check_version()


def test_the_deepspeed_that_was_tried_is_the_one_that_is_installed():
    assert f'"deepspeed>={patches.TRIED}"' in (ROOT / "setup.py").read_text()
    assert f"deepspeed=={patches.TRIED}" in (ROOT / "requirements.txt").read_text().split()
