"""Checkpoints inside a phase, and the model that a phase leaves."""

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from irlfast.common import dist, ranks
from irlfast.common.artefacts import intact, keep, keep_staged
from irlfast.common.files import InputError, open_to_umask, read_json, remove, temporary_name, write_json
from irlfast.common.messages import log
from irlfast.common.movement import at_length
from irlfast.common.tensors import is_finite
from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.engine.optim import continue_schedule
from irlfast.engine.plan import Plan
from irlfast.engine.saving import Files, Saving, begin, finish
from irlfast.engine.state import load_state, save_files, state_files
from irlfast.engine.step import add
from irlfast.engine.teacher import averages, load_averages
from irlfast.losses.inputs import Metrics
from irlfast.models.load import load_to_train, save_pretrained
from irlfast.models.lora import base_and_adapter, merge, revision_of, save_lora
from irlfast.models.padding import add_unique_padding
from irlfast.models.saved import is_converted
from irlfast.models.split import is_split
from irlfast.models.split_save import save_shards

AVERAGES = "teacher.safetensors"


def save_checkpoint(
    engine: Any, folder: Path, progress: dict[str, Any], sums: Metrics, plan: Plan, saving: Saving | None = None
) -> None:
    """Write everything that the next step needs as ``step-N``; then remove older checkpoints.

    Args:
        progress: what :func:`progress_of` returns later; its ``step`` is N.
        sums: this process's metrics of the steps since the last logged one.
        saving: with it, a thread writes (:mod:`irlfast.engine.saving`), once the checkpoint before is written.
    """
    step = progress["step"]
    path = folder / f"step-{step}"
    with at_length(f"{folder.parent.name}, writing a checkpoint"):
        if saving:
            finish(saving)
        if dist.is_main():
            remove(temporary_name(path))
        dist.barrier()
        temporary_name(path).mkdir(parents=True, exist_ok=True)
        size = {"processes": dist.world_size(), "step_size": plan.steps[0].size}
        write = functools.partial(write_checkpoint, path, progress | size)
        if saving:
            begin(saving, step, files_of(engine, sums), write)
        else:
            write(files_of(engine, sums))


def files_of(engine: Any, sums: Metrics) -> Files:
    """Yield the names and the tensors of this process's files of a checkpoint."""
    yield from state_files(engine)
    if sums:
        yield sums_file(Path(), dist.rank()).name, sums
    teacher = engine.module.teacher
    if dist.is_main() and teacher and teacher.followed:
        yield AVERAGES, averages(teacher)


def write_checkpoint(path: Path, progress: dict[str, Any], files: Files) -> None:
    """Write this process's files into ``step-N.tmp``, which gets its name ``path`` when those of all are on disk.

    Returns when it has its name. A thread may call this: processes meet in the store, not in a collective.
    """
    temporary = temporary_name(path)
    save_files(files, temporary)
    ranks.meet_beside("checkpoint")
    if dist.is_main():
        write_json(temporary / "progress.json", progress)
        open_to_umask(temporary)
        keep_staged(temporary, path)
        for old in checkpoints(path.parent):
            if old != path:
                remove(old)
    ranks.meet_beside("checkpoint")


def sums_file(checkpoint: Path, rank: int | str) -> Path:
    return checkpoint / f"sums-{rank}.safetensors"


def unlogged(folder: Path, step: int) -> Metrics:
    """Return this process's share of the ``sums`` that all processes gave to the checkpoint of a step."""
    checkpoint = folder / f"step-{step}"
    count = dist.on_main(lambda: len([*checkpoint.glob(sums_file(checkpoint, "*").name)]))
    each = [load_file(sums_file(checkpoint, rank), device=str(dist.device())) for rank in range(count)]
    zeros = {name: torch.zeros_like(value) for name, value in each[0].items()} if each else {}
    return functools.reduce(add, each[dist.rank() :: dist.world_size()], zeros)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, the newest first."""
    paths = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    return [paths[step] for step in sorted(paths, reverse=True)]


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in checkpoints(folder):
        if int(path.name[5:]) > step:
            remove(path)


def resume(engine: Any, folder: Path, plan: Plan) -> dict[str, Any]:
    """Load the newest checkpoint that is intact, if there is one, and return :func:`progress_of` it.

    Raises:
        InputError: its steps were of another size than those of ``plan``.
    """
    progress, size = progress_of(folder), plan.steps[0].size
    if not progress["step"]:
        return progress
    if progress.get("step_size", size) != size:
        raise InputError(
            f"{folder.parent.name}: found a checkpoint of steps of {progress['step_size']:,} prompts and a plan of "
            f"{size:,} per step; expected the same, by the global_batch_size that it was written with"
        )
    path = folder / f"step-{progress['step']}"
    load_state(engine, path)
    continue_schedule(engine.lr_scheduler, progress["step"])
    teacher = engine.module.teacher
    if teacher and teacher.followed:
        load_averages(teacher, path / AVERAGES)
    return progress


def progress_of(folder: Path) -> dict[str, Any]:
    """Return the progress at the checkpoint that :func:`resume` loads.

    ``step`` is the number of steps taken, ``bad_steps`` of bad ones among them, and ``grad_norm`` is of the last good
    step. ``back_to`` is the last step at which ``save_steps`` asked for a checkpoint: a preemption leaves others.
    """
    saved = dist.on_main(last_progress, folder)
    start = {"step": 0, "bad_steps": 0, "grad_norm": 0.0, "back_to": saved.get("step", 0)}
    if saved and saved["processes"] != dist.world_size():
        log(f"{folder.parent.name}: {saved['processes']} processes wrote its checkpoint, and {dist.world_size()} go on")
    return start | saved


def last_progress(folder: Path) -> dict[str, int]:
    """Return ``progress.json`` of the newest checkpoint that is intact; nothing if there is none."""
    paths = checkpoints(folder)
    for path in paths:
        if intact(path):
            return read_json(path / "progress.json")
    if paths:
        log(f"{folder.parent.name} starts anew: none of its checkpoints is intact")
    return {}


def save_model(
    engine: Any, start: Path | str, folder: Path, encoder: Encoder, reward: dict[str, Any] | None, config: Config
) -> None:
    """Write the trained weights in Hugging Face's format, gathered from all processes.

    With LoRA, a policy is written as its adapter alone. A reward model's adapter is merged into ``start``, the model
    that the phase started from. A whole policy that ZeRO-3 has split is gathered and written shard by shard.

    Raises:
        InputError: a weight is not finite; nothing is left then.
    """
    model = engine.module.model
    if is_split(model) and not config.use_peft and not reward and not is_converted(model):
        save_split(model, folder, encoder)
        return
    state = gather_state(engine, trained_only=config.use_peft)
    refuse_not_finite(not_finite(state), folder)
    if not dist.is_main():
        return
    if config.use_peft and not reward:
        save_adapter(model, state, start, folder, encoder, config)
        return
    if config.use_peft:
        adapted = load_to_train(start, config, reward=reward)
        adapted.load_state_dict(state, strict=False)
        model = merge(adapted, str(folder))
        state = model.state_dict()
    tokenizer = add_unique_padding(model, encoder, state) if reward else encoder.tokenizer
    keep(folder, lambda temporary: save_pretrained(temporary, model, tokenizer, state))


def save_split(model: Any, folder: Path, encoder: Encoder) -> None:
    """Write a whole policy that ZeRO-3 has split, as :func:`save_model` does."""
    temporary = temporary_name(folder)
    if dist.is_main():
        remove(temporary)
        save_pretrained(temporary, model, encoder.tokenizer, state={})
    bad = save_shards(temporary, model)
    if dist.is_main() and bad:
        remove(temporary)
    refuse_not_finite(bad, folder)
    if dist.is_main():
        open_to_umask(temporary)
        keep_staged(temporary, folder)


def save_teacher(engine: Any, start: Path | str, folder: Path, encoder: Encoder, config: Config) -> None:
    """Write a teacher that follows the policy as :func:`save_model` writes the policy."""
    teacher = engine.module.teacher
    model, state = teacher.prepared.model, {name: x.teacher.cpu() for name, x in teacher.followed.items()}
    refuse_not_finite(not_finite(state), folder)
    if not dist.is_main():
        return
    if config.use_peft:
        save_adapter(model, state, start, folder, encoder, config)
    else:
        keep(folder, lambda temporary: save_pretrained(temporary, model, encoder.tokenizer))


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors of which a value is not finite."""
    return [name for name, tensor in state.items() if not is_finite(tensor)]


def refuse_not_finite(bad: list[str], folder: Path) -> None:
    """Raise an InputError, in every process, if the main process names ``bad`` tensors, which are not finite."""
    names = dist.on_main(lambda: bad)
    if names:
        raise InputError(
            f"{folder.parent.name}: {names[0]} (of {len(names):,} tensors) is not finite after the last step, so that "
            f"no {folder.name} is written; try a lower learning_rate"
        )


def save_adapter(
    model: Any, state: dict[str, Tensor], start: Path | str, folder: Path, encoder: Encoder, config: Config
) -> None:
    """Write the adapter in ``state``, on the base of the model ``start``."""
    base, _ = base_and_adapter(start)
    at = revision_of(start, config)
    keep(folder, lambda temporary: save_lora(temporary, model, state, base, at, encoder.tokenizer))


def gather_state(engine: Any, trained_only: bool) -> dict[str, Tensor]:
    """Copy parameters and persistent buffers, or the trained parameters only, to the main process; others get none.

    Tied weights are one tensor under all of their names, because Transformers' ``save_pretrained`` finds them by that.
    """
    import deepspeed

    copies: dict[int, Tensor] = {}
    state = engine.module.model.state_dict(keep_vars=True)
    wanted = {name: tensor for name, tensor in state.items() if tensor.requires_grad or not trained_only}
    for tensor in {id(tensor): tensor for tensor in wanted.values()}.values():
        split = engine.zero_optimization_stage() == 3 and isinstance(tensor, torch.nn.Parameter)
        with deepspeed.zero.GatheredParameters([tensor], enabled=split):
            if dist.is_main():
                copies[id(tensor)] = tensor.detach().cpu().clone()
    return {name: copies[id(tensor)] for name, tensor in wanted.items()} if dist.is_main() else {}
