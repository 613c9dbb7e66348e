"""The bytes that a process holds at the moments when it holds most: a sum of parts for each, with a formula per part.

N parameters, of which T are trained, in b bytes each; P processes; a bytes of a sum of gradients (4, or 2 where
``grad_accum_dtype`` says so); s bytes of optimiser state per trained parameter (rmsprop 4, adamw_torch 8).

    part                    ZeRO 0    ZeRO 1               ZeRO 2        ZeRO 3
    weights                 b N       b N                  b N           b N / P
    optimiser state         s T       (4 + s) T/P          (4 + s) T/P   (4 + s) T/P
    gradients, backward     b T       a T, + b T if a > b  a T/P         a T/P
    gradients, update       b T       4 T/P                4 T/P         (a + 4) T/P

From ZeRO 1 on, the optimiser updates an fp32 copy of its share (the 4 in 4 + s) by fp32 gradients. On a CPU, where
a = b, gradients are reduced once per step: until then, ZeRO 2 and 3 hold all b T of them.

A backward pass holds the most at its beginning, when it has all activations. Gradients of earlier micro-batches are
there, but none of its own: these come as activations go. So a step of one micro-batch has no gradients at that moment,
apart from the process's share of the sum (a T/P from ZeRO 1 on). It has them all at the end of the pass.
"""

import dataclasses
from bisect import bisect_right
from typing import Any, NamedTuple

from irlfast.config import Config
from irlfast.config.deepspeed import gains_from_zero, merged_settings
from irlfast.data.batching import CPU_TOKENS
from irlfast.engine.memory import GPU_TOKENS, SAFE
from irlfast.engine.optim import STATE_BYTES
from irlfast.engine.teacher import is_live
from irlfast.methods.stages import wants_sft
from irlfast.startup.sizes import Size, bytes_of, model_size

FOUR_BITS = 0.6  # bytes of a weight in 4 bits, with its scales and the layers that stay whole
HEAD_BUFFER = 1024 * 2**20  # bytes of logits at most: buffer_mb of irlfast.ops
CPU_BUFFER, CPU_ROWS = 16 * 2**20, 256  # a CPU's logits: so many bytes, or so many rows where these take more
BUCKET = 500_000_000  # reduce_bucket_size of DeepSpeed, in elements
TRAINING_MOMENTS = ("backward", "end of backward", "update")
FLAT = 500_000_000  # gradients that DeepSpeed copies into one tensor, to reduce them together without ZeRO
LIVE = 1_000_000_000  # stage3_max_live_parameters of DeepSpeed, and its stage3_max_reuse_distance


class Room(NamedTuple):
    """The memory that the machine has for a process."""

    memory: float  # bytes
    processes: int
    on_gpu: bool
    runtime: float  # bytes that libraries take by themselves


def zero_of(config: Config, processes: int) -> dict[str, Any]:
    """Return DeepSpeed's settings of ZeRO, of which a run of so many processes makes use."""
    settings = merged_settings(config)["zero_optimization"]
    return settings if gains_from_zero(config, processes) else settings | {"stage": 0}


def sum_bytes(config: Config) -> int:
    """Return the bytes of a sum of gradients."""
    return 4 if merged_settings(config)["data_types"]["grad_accum_dtype"] == "fp32" else bytes_of(config)


def offloaded(zero: dict[str, Any], part: str) -> bool:
    """Return whether DeepSpeed's settings move ``optimizer`` or ``param`` off the GPU."""
    return (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"


def training_memory(
    config: Config, size: Size, room: Room, tokens: int, micro_batches: int = 2
) -> dict[str, dict[str, float]]:
    """Return the bytes of each part at the moments of a step: its last backward pass, that one's end, and the update.

    The step has so many ``micro_batches``, and the largest has so many ``tokens``.
    """
    zero, processes, each = zero_of(config, room.processes), room.processes, bytes_of(config)
    stage = zero["stage"]
    share = size.trained / (processes if stage else 1)
    offloads = room.on_gpu and offloaded(zero, "optimizer")
    weights = size.parameters * (FOUR_BITS if config.load_in_4bit else each) / (processes if stage == 3 else 1)
    always = {
        "weights": 0.0 if room.on_gpu and stage == 3 and offloaded(zero, "param") else weights,
        "teacher": teacher_bytes(config, size),
        "optimiser state": 0.0 if offloads else share * (state_bytes(config) + (4 if stage else 0)),
        "runtime": room.runtime,
    }
    sums = sum_bytes(config)
    summed = 0.0 if offloads else summed_bytes(size.trained, share, each, sums, stage, room.on_gpu)
    alone = 0.0 if offloads or not stage else share * sums
    update = 0.0 if offloads else {0: each, 3: sums + 4}.get(stage, 4) * share
    buckets = communication_bytes(config, size, zero, room)
    at_end = each * min(size.trained, FLAT) if stage == 0 and processes > 1 else buckets
    passing = {
        "activations": tokens * activations_per_token(config, size, room.on_gpu),
        "head buffer": head_bytes(config, size, room, tokens),
    }
    return {
        "backward": always
        | {"gradients": summed if micro_batches > 1 else min(summed, alone)}
        | passing
        | {"communication": buckets},
        "end of backward": always | {"gradients": summed, "communication": at_end},
        "update": always | {"gradients": update},
    }


def state_bytes(config: Config) -> int:
    """Return the bytes of the optimiser's state per trained parameter, in the phase that has the most."""
    names = [config.optim] * (config.method != "sft")
    names += [config.sft_optim or config.optim] * wants_sft(config)
    return max(STATE_BYTES[name] for name in names or [config.optim])


def copy_bytes(config: Config, size: Size, room: Room) -> float:
    """Return the bytes of host memory for the copy of a checkpoint of the process that has the most."""
    if not config.async_save or not config.save_steps:
        return 0.0
    share = size.trained / (room.processes if zero_of(config, room.processes)["stage"] else 1)
    follows = config.facts.has_teacher and config.sync_ref_model and not is_live(config)
    return share * (4 + state_bytes(config)) + 4 * size.trained * follows


def summed_bytes(trained: int, share: float, each: int, sums: int, stage: int, on_gpu: bool) -> float:
    """Return the bytes of gradients at the end of a backward pass; see the table above."""
    if stage == 0:
        return trained * each
    if stage == 1:
        return trained * (sums + (each if sums > each else 0))
    together = not on_gpu and sums == each
    if stage == 2:
        return trained * each if together else share * sums
    return share * sums + (trained * each if together else 0)


def teacher_bytes(config: Config, size: Size) -> float:
    """Return the bytes of a second model in training; one that follows the policy has fp32 averages, too."""
    if not config.facts.has_teacher or is_live(config):
        return 0.0
    own = size.trained if config.use_peft else size.parameters
    return own * (bytes_of(config) + (4 if config.sync_ref_model else 0))


def activations_per_token(config: Config, size: Size, on_gpu: bool) -> float:
    if config.activation_offloading and on_gpu:  # to host memory; those of one layer are here
        return size.kept.recomputed or size.kept.layer
    return size.layers * size.kept.layer + size.kept.recomputed + size.kept.rest


def head_bytes(config: Config, size: Size, room: Room, tokens: int) -> float:
    """Return the bytes of the logits that are there at a time, and of the fp32 gradients by hidden states and head."""
    row = 4 * size.vocabulary
    logits = min(HEAD_BUFFER, tokens * row) if room.on_gpu else min(tokens * row, max(CPU_BUFFER, CPU_ROWS * row))
    head = 0 if config.use_peft else 4 * size.vocabulary * size.hidden
    return logits + head + 4 * tokens * size.hidden


def communication_bytes(config: Config, size: Size, zero: dict[str, Any], room: Room) -> float:
    """Return the bytes of DeepSpeed's buckets, and of the weights that ZeRO-3 has gathered at a time.

    A CPU has memory only for the part of a bucket that is written. The embeddings and the head stay gathered until the
    end of a pass. From the second pass on, so do weights that are used again within ``stage3_max_reuse_distance``.
    """
    stage, each = zero["stage"], bytes_of(config)
    if stage == 0 or room.processes == 1:
        return 0.0
    bucket = min(zero.get("reduce_bucket_size", BUCKET), size.trained)
    if stage == 3:
        kept = max(zero.get(f"stage3_max_{what}", LIVE) for what in ("live_parameters", "reuse_distance"))
        live = max(kept, 2 * size.vocabulary * size.hidden)
        bucket = zero.get("reduce_bucket_size", BUCKET) if room.on_gpu else bucket
        return each * (min(size.parameters, live) + bucket)
    return each * bucket * (2 if zero.get("overlap_comm", True) else 1) if room.on_gpu else 0.0


def scoring_memory(config: Config, size: Size, room: Room, tokens: int) -> dict[str, float]:
    """Return the bytes of each part while a model scores batches of ``tokens`` tokens.

    ZeRO-3 splits the model, and gathers the parameters of one module at a time, of which the head has the most.
    """
    each = FOUR_BITS if config.load_in_4bit else bytes_of(config)
    layer = size.kept.recomputed or size.kept.layer
    split = zero_splits(config, room)
    return {
        "weights": size.parameters * each / (room.processes if split else 1),
        "activations": tokens * layer,
        "communication": each * size.vocabulary * size.hidden if split else 0.0,
        "runtime": room.runtime,
    }


def zero_splits(config: Config, room: Room) -> bool:
    return room.processes > 1 and not config.load_in_4bit and merged_settings(config)["zero_optimization"]["stage"] == 3


def sampling_memory(config: Config, size: Size, room: Room, prompt: int) -> dict[str, float]:
    """Return the bytes of each part while answers are sampled to prompts of ``prompt`` tokens.

    vLLM takes its share whatever it needs: ``cache`` is what the weights leave of the share. Where Transformers samples
    by a policy that ZeRO-3 splits, a process gathers the parameters of one module at a time.
    """
    split = config.vllm_tensor_parallel_size if config.use_vllm else 1
    if samples_by_parts(config, room):
        weights = size.parameters * bytes_of(config) / room.processes + size.vocabulary * size.hidden * bytes_of(config)
    else:
        weights = size.parameters * bytes_of(config) / split
    sequence = size.key_values * bytes_of(config) * (prompt + config.max_new_tokens) / split
    if config.use_vllm and room.on_gpu:
        share = config.vllm_gpu_memory_utilization * room.memory
        return {"weights": weights, "cache": max(share - weights, sequence), "runtime": room.runtime}
    return {"weights": weights, "cache": sequence * config.per_device_eval_batch_size, "runtime": room.runtime}


def samples_by_parts(config: Config, room: Room) -> bool:
    return zero_splits(config, room) and not config.ds3_gather_for_generation


def tokens_per_batch(config: Config, size: Size, room: Room, longest: int, step: int) -> int:
    """Return the tokens of a micro-batch, where the ``longest`` group and a process's ``step`` have so many.

    With ``auto`` that is what the GPU's memory holds, at least one group.
    """
    if config.max_tokens_per_batch != "auto":
        return max(longest, min(step, config.max_tokens_per_batch))
    if not room.on_gpu:
        return max(longest, min(step, CPU_TOKENS))
    possible = range(longest, max(longest, min(step, GPU_TOKENS)) + 1)
    fitting = bisect_right(possible, SAFE * room.memory, key=lambda n: most(training_memory(config, size, room, n)))
    return possible[max(fitting - 1, 0)]


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def most(moments: dict[str, dict[str, float]]) -> float:
    """Return the bytes of the moment that needs the most."""
    return max(map(total, moments.values()))


# ---------------------------------------------------------------- what does not fit


CHANGES: dict[str, dict[str, Any]] = {  # keys that take less memory, from those that change a run least
    "gradient_checkpointing: true": {"gradient_checkpointing": True},
    "zero_stage: 2": {"zero_stage": 2},
    "zero_stage: 3": {"zero_stage": 3},
    "zero_stage: 3 with gradient_checkpointing: true": {"zero_stage": 3, "gradient_checkpointing": True},
    "use_peft: true": {"use_peft": True},
    "load_in_4bit: true with use_peft: true": {"use_peft": True, "load_in_4bit": True},
}


def misfit(config: Config, room: Room, moments: dict[str, dict[str, float]], longest: int) -> str:
    """Return a sentence if a part of the run does not fit: which one, and the first key that helps; else ""."""
    for moment, parts in moments.items():
        needed = total(parts)
        if needed <= room.memory:
            continue
        largest = max(parts, key=lambda part: parts[part])
        return (
            f"{moment} does not fit: {gib(needed)} per GPU, {gib(parts[largest])} of them {largest}, and a GPU has "
            f"{gib(room.memory)}; {what_helps(config, room, moment, longest)}"
        )
    return ""


def what_helps(config: Config, room: Room, moment: str, longest: int) -> str:
    """Return advice: the first change with which training fits; for the others, what they need."""
    if moment == "sampling":
        return (
            "expected use_vllm: true with a higher vllm_tensor_parallel_size, or, which is slow, "
            "ds3_gather_for_generation: false with zero_stage: 3"
        )
    if moment == "scoring":
        if zero_splits(config, room):
            return "expected more GPUs, GPUs with more memory, or a smaller model"
        return "expected zero_stage: 3 on several GPUs, which share the model then"
    for change, keys in CHANGES.items():
        changed = dataclasses.replace(config, **keys)
        size = model_size(changed)
        assert size
        if most(training_memory(changed, size, room, longest)) <= room.memory:
            return f"expected {change}, with which it fits"
    return "expected more GPUs with zero_stage: 3, or a `deepspeed` file with offload_optimizer and offload_param"


def gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"
