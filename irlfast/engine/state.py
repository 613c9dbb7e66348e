"""The state of training on disk, in safetensors: what any number of processes writes, any number of processes reads.

A trained parameter has fp32 weights and the optimiser's state, such as ``exp_avg_sq``. ZeRO splits both among the
processes, and each writes the spans that it holds. A span is a run of a parameter's values, and its tensor is called
``FIRST/KIND/PARAMETER``: the place of its first value in the flattened parameter, the kind of value, and the
parameter's name. A process reads the spans that it needs from the files of all.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError, flush
from irlfast.common.tensors import save_tensors
from irlfast.engine.deepspeed_patches import Span, give_weights_to_model, held_spans
from irlfast.engine.saving import Files

WEIGHTS, BUFFER, STEP = "weights", "buffer", "step"  # kinds of values beside the states that the optimiser names
FILE_BYTES = 1 << 30  # a file is full from here on, because it is copied to host memory before it is written


class Saved(NamedTuple):
    """A span in an open file."""

    first: int
    length: int
    file: Any
    key: str


SavedSpans = dict[str, dict[str, list[Saved]]]  # by parameter and kind


def save_files(files: Files, folder: Path) -> None:
    """Write files into ``folder``, one after the other, and flush them to disk."""
    for name, tensors in files:
        save_tensors(tensors, folder / name)
        flush(folder / name)


def state_files(engine: Any) -> Files:
    """Yield the names and the tensors of the files that hold this process's spans."""
    tensors: dict[str, Tensor] = {}
    number = size = 0
    for key, values in held_values(engine):
        if size and size + values.nbytes > FILE_BYTES:
            yield file_name(number), tensors
            tensors, size, number = {}, 0, number + 1
        tensors[key] = values
        size += values.nbytes
    if tensors:
        yield file_name(number), tensors


def file_name(number: int) -> str:
    return f"state-{dist.rank()}-{number}.safetensors"


def held_values(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and the values of this process's spans. Without ZeRO the main process has those of all."""
    if dist.is_main():
        for name, buffer in persistent_buffers(engine).items():
            yield f"0/{BUFFER}/{name}", buffer.flatten()
    if not dist.is_main() and not engine.zero_optimization_stage():
        return
    for span in held_spans(engine):
        yield f"{span.first}/{WEIGHTS}/{span.name}", span.of(span.weights)
        for kind, values in engine.optimizer.state.get(span.weights, {}).items():
            own = torch.tensor([float(values)]) if kind == STEP else span.of(values)
            yield f"{span.first}/{kind}/{span.name}", own


def persistent_buffers(engine: Any) -> dict[str, Tensor]:
    model = engine.module.model
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


@torch.no_grad()
def load_state(engine: Any, folder: Path) -> None:
    """Continue with the state that :func:`state_files` has given and ``folder`` holds, in however many processes.

    Raises:
        InputError: it is the state of other parameters than the model's.
    """
    with contextlib.ExitStack() as opened:
        saved = saved_spans(folder, opened)
        check_parameters(engine, saved, folder)
        for name, buffer in persistent_buffers(engine).items():
            fill(buffer.view(-1), 0, saved[name][BUFFER])
        for span in held_spans(engine):
            fill(span.of(span.weights), span.first, saved[span.name].pop(WEIGHTS))
            load_optimizer_state(span, engine.optimizer.state[span.weights], saved[span.name])
    give_weights_to_model(engine)


def saved_spans(folder: Path, opened: contextlib.ExitStack) -> SavedSpans:
    """Return the spans in all files of ``folder``, which stay open as long as ``opened``."""
    saved: SavedSpans = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("state-*.safetensors")):
        file = opened.enter_context(safe_open(path, "pt"))
        for key in sorted(file.keys()):
            first, kind, name = key.split("/", 2)
            [length] = file.get_slice(key).get_shape()
            saved[name][kind].append(Saved(int(first), length, file, key))
    return saved


def check_parameters(engine: Any, saved: SavedSpans, folder: Path) -> None:
    """Raise an InputError unless the saved parameters have the names and sizes of the model's trained ones."""
    named = engine.module.model.named_parameters()
    own = {name: getattr(p, "ds_numel", p.numel()) for name, p in named if p.requires_grad}  # ZeRO-3 empties parameters
    there = {name: max(x.first + x.length for x in kinds[WEIGHTS]) for name, kinds in saved.items() if WEIGHTS in kinds}
    if other := sorted(name for name in own.keys() | there.keys() if own.get(name) != there.get(name)):
        name = other[0]
        raise InputError(
            f"{folder}: found {there.get(name, 0):,} values of {name}, expected {own.get(name, 0):,}; continue with "
            "the version of irlfast that wrote the checkpoint, or delete its folder to begin the phase anew"
        )


def load_optimizer_state(span: Span, state: dict[str, Tensor], saved: dict[str, list[Saved]]) -> None:
    """Fill a span of the optimiser's ``state``, which gets the kinds that it lacks. The latest saved step counts."""
    for kind, spans in saved.items():
        tensors = [each.file.get_slice(each.key) for each in spans]
        if kind == STEP:
            latest = torch.cat([tensor[:] for tensor in tensors]).max()
            state[STEP] = torch.maximum(state.get(STEP, latest), latest)
            continue
        if kind not in state:
            state[kind] = torch.zeros_like(span.weights, dtype=tensors[0][:0].dtype)
        fill(span.of(state[kind]), span.first, spans)


def fill(values: Tensor, first: int, saved: list[Saved]) -> None:
    """Fill ``values``, which begin at value ``first`` of a parameter, from the saved spans of this parameter."""
    last = first + len(values)
    for span in saved:
        low, high = max(first, span.first), min(last, span.first + span.length)
        if low < high:
            values[low - first : high - first] = span.file.get_slice(span.key)[low - span.first : high - span.first]
