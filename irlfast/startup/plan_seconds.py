"""The seconds that a step, answers, scores and loads take: operations and bytes, divided by the rates of the machine.

Per process and step, with P processes and m micro-batches, W bytes of weights and G bytes of gradients, a ring of
processes sends and receives (Patarasuk and Yuan 2009):

    ZeRO 0    2 G (P-1)/P                       gradients are summed in all processes
    ZeRO 1    (G + W) (P-1)/P                   each process gets its share of the sum, then all get the new weights
    ZeRO 2    (m G + W) (P-1)/P                 as ZeRO 1, after each micro-batch
    ZeRO 3    (m (G + 2 (W - H)) + H) (P-1)/P   weights are gathered forward and backward, the head's H bytes once

On a CPU, gradients are reduced once per step, and everywhere (2 G in place of G). Where ZeRO-3 has split a model that
scores, each forward pass gathers its weights; where Transformers samples by a split policy, each token of a batch does.

ZeRO-3 has a hook of DeepSpeed before and after each module, which gathers and frees its weights. That takes the same
time however few tokens a pass has: a CPU that trains a small model in small batches spends half a step on it. A GPU is
taken to compute meanwhile.
"""

import math
from typing import NamedTuple

from irlfast.config import Config
from irlfast.data.packing import SHARED, PromptGroup, count_tokens, token_counts
from irlfast.engine.hardware import Cluster
from irlfast.engine.optim import STATE_BYTES
from irlfast.engine.plan import Plan
from irlfast.models.costs import operations
from irlfast.startup.plan_memory import Room, samples_by_parts, zero_of, zero_splits
from irlfast.startup.sizes import Size, bytes_of

TRAINING = 0.4  # assumed share of a data sheet's operations that forward and backward passes reach
MOVING = 0.7  # assumed share of a data sheet's bytes per second of memory and links
STORAGE = 2e9  # assumed bytes per second that a model is read with
START = 60.0  # assumed seconds that vLLM takes to start, without its weights
SEQUENCES = 256  # that vLLM decodes at a time at most
# Seconds per layer of a decoding step of Transformers on a GPU, however few sequences it has: the host starts each of
# its kernels. 39.4 s on an H200 for 10.5 batches of 128 steps of 24 layers (benchmarks/results/2026-11-26-stage.json).
DECODING_LAYER = 1.2e-3


class Rates(NamedTuple):
    """The operations and bytes per second of a process, as measured or assumed."""

    training: float  # operations per second of forward and backward passes
    memory: float  # bytes per second of the optimiser's step and of decoding
    link: float  # bytes per second to other processes
    storage: float = STORAGE  # bytes per second of a model that is loaded
    start: float = START  # seconds
    sampling: float = 1.0  # seconds of sampling per second of the model's
    scoring: float = 1.0  # the same of scoring
    hooks: float = 0.0  # seconds per layer and pass in which DeepSpeed's hooks gather the weights of ZeRO-3
    runtime: float = 2e9  # bytes that libraries take: CUDA's context and NCCL's buffers are assumed to take 2 GB
    source: str = "assumed shares of data sheets' figures"


class Lengths(NamedTuple):
    """Mean numbers of tokens."""

    prompt: float
    answer: float  # of a demonstration
    sampled: float  # of a sampled answer


def assumed_rates(cluster: Cluster, config: Config) -> Rates:
    """Return the rates that a cluster is assumed to reach without a measurement."""
    gpu = cluster.gpu
    link = gpu.nvlink if cluster.nodes == 1 else min(gpu.nvlink, gpu.network)
    return Rates(TRAINING * gpu.operations[config.dtype], MOVING * gpu.bandwidth, MOVING * link)


def group_of(lengths: Lengths, answers: int) -> PromptGroup:
    """Make a prompt group of mean lengths: a demonstration first where there are several answers, then sampled ones."""
    first, others = (lengths.answer if answers <= 2 else lengths.sampled), (lengths.sampled,) * (answers - 1)
    return PromptGroup(range(round(lengths.prompt)), tuple(range(max(1, round(n))) for n in (first, *others)))


def group_operations(config: Config, size: Size, lengths: Lengths, answers: int, reward: bool = False) -> float:
    """Return the operations that a group takes in training: those of a step, and those of recomputed layers."""
    costs = size.costs._replace(answer_token=0) if reward else size.costs
    counts = token_counts([group_of(lengths, answers)], SHARED)
    once = operations(costs, counts)
    forward: float = size.forward * counts["tokens"] + costs.attended / 3 * counts["attended"]
    return once + (forward if config.gradient_checkpointing is True else 0)


def step_seconds(
    config: Config,
    size: Size,
    room: Room,
    rates: Rates,
    lengths: Lengths,
    plan: Plan,
    answers: int,
    micro_batches: int,
) -> dict[str, float]:
    """Return the seconds of each part of an optimiser step of ``plan``, with so many ``answers`` per prompt group."""
    processes, each = room.processes, bytes_of(config)
    stage = zero_of(config, processes)["stage"]
    computed = group_operations(config, size, lengths, answers, bool(plan.reward)) * plan.steps[0].size / processes
    sent = bytes_sent(stage, processes, micro_batches, size, each, room.on_gpu)
    return {
        "forward and backward": computed / rates.training,
        "communication": sent / rates.link,
        "gathering": gathering_passes(config, size, stage) * micro_batches * rates.hooks,
        "optimiser": updated_bytes(config, size, processes, plan.optim) / rates.memory,
    }


def gathering_passes(config: Config, size: Size, stage: int) -> int:
    """Return how many times a layer's weights are gathered in a micro-batch, summed over all layers."""
    return (3 if config.gradient_checkpointing is True else 2) * size.layers if stage == 3 else 0


def updated_bytes(config: Config, size: Size, processes: int, optim: str) -> float:
    """Return the bytes that the optimiser's step reads and writes in a process.

    The gradients are read for their norm, scaled in place, and read by the update. The update reads and writes states
    and fp32 weights. With ZeRO, a search for values that are not finite reads the gradients once more, and the fp32
    weights are copied to those of the model.
    """
    stage, each = zero_of(config, processes)["stage"], bytes_of(config)
    share = size.trained / (processes if stage else 1)
    gradients, states, weights = 4 + 8 + 4, 2 * STATE_BYTES[optim], 8
    return share * (gradients + states + weights + (4 + 4 + each if stage else 0))


def bytes_sent(stage: int, processes: int, micro_batches: int, size: Size, each: int, on_gpu: bool) -> float:
    """Return the bytes that a process sends in a step, where a value has ``each`` bytes; see the table above."""
    times = micro_batches if on_gpu and stage > 1 else 1
    both = 1 if on_gpu and stage else 2
    gradients, weights, head = (each * count for count in (size.trained, size.parameters, head_values(size)))
    moved = {
        0: 2 * gradients,
        1: both * gradients + weights,
        2: both * times * gradients + weights,
        3: times * gradients + 2 * micro_batches * (weights - head) + head,
    }[stage]
    return moved * (processes - 1) / processes


def head_values(size: Size) -> int:
    return size.vocabulary * size.hidden


def gathering_seconds(config: Config, size: Size, room: Room, rates: Rates, passes: float) -> float:
    """Return the seconds in which ZeRO-3 gathers all weights of a split model for so many passes without a gradient."""
    sent = bytes_of(config) * size.parameters * (room.processes - 1) / room.processes
    return passes * (sent / rates.link + size.layers * rates.hooks)


def sampling_seconds(
    config: Config, size: Size, room: Room, rates: Rates, lengths: Lengths, answers: float, cache: float
) -> float:
    """Return the seconds of ``answers`` sampled answers, where ``cache`` bytes hold keys and values.

    A decoding step reads the weights, and the keys and values of all its sequences; or its products take longer; or,
    in Transformers on a GPU, the host does. A server of ``vllm_server`` is taken for an engine on such GPUs as train.
    """
    if not answers:
        return 0.0
    split = config.vllm_tensor_parallel_size if config.use_vllm else 1
    engines = len(config.vllm_server) or max(1, room.processes // split)
    token = size.key_values * bytes_of(config) / split
    most = SEQUENCES if config.use_vllm else config.per_device_eval_batch_size
    held = cache / max(token * (lengths.prompt + lengths.sampled), 1)
    together = max(1.0, min(most, held, answers / engines))
    weights = size.parameters * bytes_of(config) / split
    read = (weights + together * token * (lengths.prompt + lengths.sampled / 2)) / rates.memory
    started = size.layers * DECODING_LAYER if room.on_gpu and not config.use_vllm else 0.0
    step = max(read, 2 * size.parameters * together / split / rates.training, started)
    prompts = 2 * size.parameters * lengths.prompt * answers / engines / split / rates.training
    passes = math.ceil(answers / engines / together) * lengths.sampled
    gathering = gathering_seconds(config, size, room, rates, passes) if samples_by_parts(config, room) else 0.0
    return rates.sampling * (passes * step + prompts) + gathering


def scoring_seconds(
    size: Size, room: Room, rates: Rates, lengths: Lengths, groups: float, answers: int, models: int
) -> float:
    """Return the seconds in which ``models`` score ``groups`` prompt groups: the forward part of training."""
    counts = token_counts([group_of(lengths, answers)], SHARED)
    forward: float = size.forward * counts["tokens"] + 2 * head_values(size) * counts["answer_tokens"]
    forward += size.costs.attended / 3 * counts["attended"]
    return rates.scoring * models * groups * forward / room.processes / rates.training


def split_scoring_seconds(
    config: Config, size: Size, room: Room, rates: Rates, lengths: Lengths, groups: float, answers: int, tokens: int
) -> float:
    """Return the seconds in which a model that ZeRO-3 splits is gathered to score groups, ``tokens`` a pass; else 0."""
    if not zero_splits(config, room) or not groups:
        return 0.0
    own = groups / room.processes * count_tokens(group_of(lengths, answers))
    return gathering_seconds(config, size, room, rates, math.ceil(own / tokens))


def load_seconds(config: Config, size: Size, rates: Rates) -> dict[str, float]:
    """Return the seconds in which a model is loaded to train or to score, and in which a sampler starts.

    Servers run already, and load the policy alone.
    """
    read = size.parameters * bytes_of(config) / rates.storage
    starts = config.use_vllm and not config.vllm_server
    return {"model": read, "sampler": read + (rates.start if starts else 0.0)}
