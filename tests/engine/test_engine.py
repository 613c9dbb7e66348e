"""Layers that are compiled, recomputed or offloaded have the plain layers' gradients; a compiled run resumes."""

import copy
import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from irlfast.data.packing import pack
from irlfast.engine.layers import compile_layers
from irlfast.engine.module import offloaded
from irlfast.models.forward import hidden_states
from irlfast.models.steady import recompute_layers
from tests.data.test_packing import model_of, ragged, with_gradients
from tests.helpers.runs import run, run_killed_at
from tests.helpers.tiers import full, slow, sweep

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


@sweep(full, way=WAYS, name=["Llama", "GPT-NeoX"])
def test_gradients_are_those_of_the_plain_layers(name, way):
    if compile_layers in WAYS[way]:
        needs_a_compiler()
    plain = model_of(name)
    model = copy.deepcopy(plain)
    for change in WAYS[way]:
        change(model)
    for groups in (ragged(), ragged()[1:]):  # two shapes
        expected, gradients = with_gradients(plain, [pack(groups)])
        actual, others = with_gradients(model, [pack(groups)])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(others, gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX"])
def test_activations_kept_in_host_memory_give_the_same_gradients(name, recomputed):
    model = model_of(name)
    if recomputed:
        recompute_layers(model, selective=False)
    expected, gradients = with_gradients(model, [pack(ragged())])
    with offloaded(model):
        actual, others = with_gradients(model, [pack(ragged())])
    assert torch.equal(actual, expected)
    assert all(map(torch.equal, others, gradients))


def kept_by(hooks, run) -> tuple[int, int]:
    """Count the elements that ``run`` copies to host memory, and those that stay, under ``hooks``."""
    moved = stayed = 0

    def pack_and_count(tensor):
        nonlocal moved, stayed
        kept = hooks.pack_hook(tensor)
        if kept[1] is tensor:
            stayed += tensor.numel()
        else:
            moved += tensor.numel()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack_and_count, hooks.unpack_hook):
        run()
    return moved, stayed


def test_activations_move_to_host_memory_and_weights_stay():
    model = model_of("Llama")
    batch = pack(ragged())
    tokens, config = batch.input_ids.numel(), model.config
    moved, stayed = kept_by(offloaded(model), lambda: hidden_states(model, batch))
    assert moved > 10 * config.num_hidden_layers * tokens * config.hidden_size
    assert stayed >= sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    recompute_layers(model, selective=False)
    inputs, _ = kept_by(offloaded(model), lambda: hidden_states(model, batch))  # of the layers, and the last norm
    assert config.num_hidden_layers * tokens * config.hidden_size <= inputs < moved / 5


def test_selective_recomputation_repeats_no_matrix_product():
    operations = {}
    for way in (None, False, True):
        model = model_of("Llama")
        if way is not None:
            recompute_layers(model, selective=way)
        with FlopCounterMode(display=False) as counter:
            with_gradients(model, [pack(ragged())])
        operations[way] = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert operations[True] == operations[None] < operations[False]


SFT = {"method": "sft", "inner_steps": "null"}


@slow
@pytest.mark.parametrize("keys", [SFT, {"stages": 1}], ids=["sft", "irft"])
def test_a_compiled_run_that_is_killed_resumes_to_the_same_policy(tmp_path, keys):
    needs_a_compiler()
    keys = {"torch_compile": "true", **keys}
    run(tmp_path / "unbroken", **keys)
    run_killed_at(tmp_path / "run", ["sft/checkpoint/step-2"], **keys)
    run(tmp_path / "run", **keys)
    unbroken, resumed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("unbroken", "run"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
