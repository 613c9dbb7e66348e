"""How the policy's layers run: compiled, or recomputed in the backward pass; and a compiled run's resumption."""

import copy
import functools
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from irlfast.engine import compile_layers, recompute_layers
from irlfast.pack import pack
from tests.runs import command, run, start
from tests.test_pack import model_of, ragged, with_gradients

WAYS = {
    "compiled": [compile_layers],
    "recomputed": [functools.partial(recompute_layers, selective=False)],
    "recomputed but for products": [functools.partial(recompute_layers, selective=True)],
    "compiled and recomputed": [functools.partial(recompute_layers, selective=False), compile_layers],
    "compiled and recomputed but for products": [functools.partial(recompute_layers, selective=True), compile_layers],
}


def needs_a_compiler() -> None:
    if not shutil.which("g++"):
        pytest.skip("torch.compile takes a C++ compiler")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX"])
def test_gradients_are_those_of_the_plain_layers(name, way):
    if compile_layers in WAYS[way]:
        needs_a_compiler()
    plain = model_of(name).train()
    model = copy.deepcopy(plain)
    for change in WAYS[way]:
        change(model)
    for segments in (ragged(), ragged()[1:]):  # two shapes
        expected, gradients = with_gradients(plain, [pack(segments)])
        found, others = with_gradients(model, [pack(segments)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(others, gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


def test_selective_recomputation_leaves_out_the_products():
    operations = {}
    for way in (None, False, True):
        model = model_of("Llama").train()
        if way is not None:
            recompute_layers(model, selective=way)
        with FlopCounterMode(display=False) as counter:
            with_gradients(model, [pack(ragged())])
        operations[way] = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert operations[True] == operations[None] < operations[False]


def test_a_compiled_run_that_is_killed_resumes_to_the_same_policy(tmp_path):
    needs_a_compiler()
    keys = {"torch_compile": "true", "stages": 1}
    run(tmp_path / "unbroken", **keys)
    process = start(command(tmp_path / "run", **keys))
    while not (tmp_path / "run" / "sft" / "checkpoint" / "progress.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(tmp_path / "run", **keys)
    unbroken, resumed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("unbroken", "run"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
