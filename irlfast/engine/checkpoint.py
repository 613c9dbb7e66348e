"""Checkpoints inside a phase, and the model that a phase leaves."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import read_json, remove, write, write_json
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.engine.teacher import load_averages, save_averages
from irlfast.models.load import load_to_train, save_pretrained
from irlfast.models.lora import base_and_adapter, merge, revision_of, save_lora
from irlfast.models.padding import add_unique_padding

AVERAGES = "teacher.safetensors"


def save_checkpoint(engine: Any, folder: Path, step: int, config: Config) -> None:
    """Write everything that the next step needs, then ``progress.json``, which names it; remove older checkpoints."""
    tag, teacher = f"step-{step}", engine.module.teacher
    engine.save_checkpoint(
        str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=leaves_out_base(engine, config)
    )
    dist.barrier()
    if dist.is_main():
        if teacher and teacher.followed:
            save_averages(teacher, folder / tag / AVERAGES)
        write_json(folder / "progress.json", {"step": step, "tag": tag, "processes": dist.world_size()})
        for old in folder.glob("step-*"):
            if old.name != tag:
                remove(old)


def resume(engine: Any, folder: Path, config: Config) -> int:
    """Load the newest checkpoint, if there is one, and return the number of steps already taken."""
    path = folder / "progress.json"
    if not path.exists():
        return 0
    progress = read_json(path)
    if progress["processes"] != dist.world_size():
        log(
            f"{folder.parent.name} starts anew: its checkpoint was written by {progress['processes']} processes, "
            f"and now there are {dist.world_size()}"
        )
        return 0
    engine.load_checkpoint(str(folder), tag=progress["tag"], load_module_strict=not leaves_out_base(engine, config))
    teacher = engine.module.teacher
    if teacher and teacher.followed:
        load_averages(teacher, folder / progress["tag"] / AVERAGES)
    return progress["step"]


def leaves_out_base(engine: Any, config: Config) -> bool:
    """Return whether checkpoints leave out LoRA's frozen base, which is loaded anyway; ZeRO-3 holds it in parts."""
    return config.use_peft and engine.zero_optimization_stage() < 3


def save_model(
    engine: Any, start: Path | str, folder: Path, encoder: Encoder, reward: dict[str, Any] | None, config: Config
) -> None:
    """Write the trained weights in Hugging Face's format, gathered from all processes.

    With LoRA, a policy is written as its adapter alone. A reward model's adapter is merged into ``start``, the model
    that the phase started from.
    """
    model, state = engine.module.model, gather_state(engine, trained_only=config.use_peft)
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
    write(folder, lambda temporary: save_pretrained(temporary, model, tokenizer, state))


def save_teacher(engine: Any, start: Path | str, folder: Path, encoder: Encoder, config: Config) -> None:
    """Write a teacher that follows the policy as :func:`save_model` writes the policy."""
    teacher = engine.module.teacher
    model, state = teacher.prepared.model, {name: x.teacher.cpu() for name, x in teacher.followed.items()}
    if not dist.is_main():
        return
    if config.use_peft:
        save_adapter(model, state, start, folder, encoder, config)
    else:
        write(folder, lambda temporary: save_pretrained(temporary, model, encoder.tokenizer))


def save_adapter(
    model: Any, state: dict[str, Tensor], start: Path | str, folder: Path, encoder: Encoder, config: Config
) -> None:
    """Write the adapter in ``state``, on the base of the model ``start``."""
    base, _ = base_and_adapter(start)
    at = revision_of(start, config)
    write(folder, lambda temporary: save_lora(temporary, model, state, base, at, encoder.tokenizer))


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
