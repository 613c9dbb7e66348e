"""Policies that ZeRO-3 has split are saved shard by shard: no process ever holds more than one shard and one tensor."""

from pathlib import Path
from typing import Any

from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import json_text, put_text
from irlfast.common.tensors import is_finite, save_tensors
from irlfast.models.split import gathered, size_of

SHARD_BYTES = 2 << 30  # a shard is full from here on, because the main process holds it until it is written


def save_shards(folder: Path, model: Any) -> list[str]:
    """Write a model's tensors as Hugging Face's safetensors shards of at most ``SHARD_BYTES``, or of one tensor.

    All processes call this function; the main process writes.

    Returns:
        in the main process, the names of the tensors that are not finite.

    Raises:
        OSError: a file does not hold its tensors afterwards.
    """
    tensors, bad = tensors_to_save(model), []
    shards = shards_of(tensors, SHARD_BYTES)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for name in names:
            with gathered(tensors[name]):
                if dist.is_main():
                    shard[name] = tensors[name].detach().to("cpu", copy=True).contiguous()
        if dist.is_main():
            bad += [name for name, tensor in shard.items() if not is_finite(tensor)]
            save_tensors(shard, folder / file, {"format": "pt"})
        dist.barrier()  # so that no process waits in a collective while a shard is written
    if dist.is_main() and len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        size = {"total_size": sum(map(bytes_of, tensors.values()))}
        put_text(folder / "model.safetensors.index.json", json_text({"metadata": size, "weight_map": places}))
    return bad


def tensors_to_save(model: Any) -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers that belong into a checkpoint; a tied one has its first name."""
    left_out = model._keys_to_ignore_on_save or ()
    state = {name: x for name, x in model.state_dict(keep_vars=True).items() if name not in left_out}
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def shards_of(tensors: dict[str, Tensor], most: int) -> list[list[str]]:
    """Share out the names in order, so that the tensors of a shard have at most ``most`` bytes if they are several."""
    shards: list[list[str]] = []
    size = 0
    for name, tensor in tensors.items():
        if not shards or size + bytes_of(tensor) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_of(tensor)
    return shards


def bytes_of(tensor: Tensor) -> int:
    return size_of(tensor) * tensor.element_size()
