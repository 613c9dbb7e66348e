"""``--dry_run``: the resolved configuration, examples with the loss mask made visible, steps, memory and time."""

import dataclasses
import datetime
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from rich.markup import escape

from irlfast.common import dist
from irlfast.common.files import InputError, find_path, read_jsonl
from irlfast.config import Config, dump
from irlfast.data.encoding import Encoder
from irlfast.data.packing import PromptGroup
from irlfast.data.sets import read_sets
from irlfast.data.sources import locate, sources_of
from irlfast.data.store import Example
from irlfast.engine.fit import fit
from irlfast.engine.plan import plan_phase
from irlfast.engine.process_group import destroy_process_group, init_process_group
from irlfast.engine.teacher import is_live
from irlfast.losses.sft import sft_loss
from irlfast.methods import METHODS
from irlfast.models.build import build_model
from irlfast.models.configs import load_model_config
from irlfast.runs.metrics_log import MetricsLog
from irlfast.runs.run import Run
from irlfast.startup.limits import check_sizes
from irlfast.startup.prepare import check_model, check_rows, describe, quiet, read_encoder

EXAMPLES = 3
EFFICIENCY = 0.4  # share of a matrix product's rate that a whole training step reaches
BY_MATRICES = f"{EFFICIENCY:.0%} of a matrix product's"
SAFE = 0.8  # share of the free memory that a model may take for a measured step


class Size(NamedTuple):
    parameters: int
    layers: int
    hidden: int


def show(config: Config) -> None:
    """Print what a run would do. Parts that need a download which is out of reach are named and left out."""
    quiet()
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"[bold]configuration[/]\n{escape(dump(config))}")
    size, train, encoder = model_size(config), None, None
    prompts: list[Example] = []
    if size:
        check_model(config)
    try:
        encoder = read_encoder(config, datetime.datetime.now())
        sets = read_sets(config, encoder)
        train, prompts = sets.train, sets.prompts
        if config.model_name_or_path:
            check_rows(config, encoder, [*train, *sets.held_out, *sets.prompts])
        check_sizes(config, train, [*sets.held_out, *sets.prompts])
        out.print(f"[bold]data[/]\n{escape(describe(sets))}\n")
        show_examples(out, train[:EXAMPLES], encoder)
        size = model_size(config, len(encoder.tokenizer))
    except InputError as error:
        if (
            all(locate(source.name) for source in sources_of(config)) and size
        ):  # nothing is missing here, so the data is wrong
            raise
        out.print(f"[bold]data[/]\nnot checked: {escape(str(error))}\n")
    out.print(f"[bold]model[/]\n{size.parameters:,} parameters\n" if size else "[bold]model[/]\ncannot be had here\n")
    rate, how = (
        rate_of(config, encoder, train, size) if train and encoder and size else (matrix_rate(config), BY_MATRICES)
    )
    show_estimates(out, config, train, len(prompts), size, rate, how)


def show_examples(out: Console, examples: list[Example], encoder: Encoder) -> None:
    out.print("[bold]examples[/] (the loss is on the tokens in ⟦ ⟧ alone)")
    for example in examples:
        prompt, answer = (
            escape(encoder.tokenizer.decode(ids.tolist())) for ids in (example.prompt_ids, example.answer_ids)
        )
        out.print(f"[dim]{prompt}[/][green]⟦{answer}⟧[/]")
        out.print(f"[dim]{len(example.prompt_ids)} prompt tokens + {len(example.answer_ids)} answer tokens[/]\n")


def show_estimates(
    out: Console,
    config: Config,
    train: list[Example] | None,
    prompts: int,
    size: Size | None,
    rate: float,
    how: str,
) -> None:
    rows = len(train) if train else config.max_train_samples
    if not rows:
        out.print("steps: unknown without the data; max_train_samples gives a bound")
        return
    length = mean_length(train) if train else float(config.max_length)
    length_note = f"{length:.0f} tokens per sequence" + ("" if train else " (max_length)")
    out.print(
        f"[bold]phases[/] (at most; {dist.world_size()} process, {length_note}; {rate / 1e12:.3f} TFLOP/s, {how})"
    )
    for phase in METHODS[config.method].phases(config, rows, *[prompts] * bool(prompts)):
        steps = phase.plan().steps
        sequences = len(steps) * steps[0].size * phase.answers
        line = f"{phase.name}: {len(steps):,} optimiser steps of {steps[0].size}, {sequences:,} sequences"
        if size:
            # A parameter takes 6 operations per trained token, 2 per sampled token, and 2 per token and model to score.
            operations = size.parameters * length * (6 * sequences + (2 + 2 * 2) * phase.sampled)
            line += f", about {duration(operations / rate / dist.world_size())}"
        out.print(line)
    if size:
        out.print(f"\n[bold]memory[/]\nabout {memory(config, size, length) / 2**30:.2f} GiB per device in training")


def mean_length(examples: list[Example]) -> float:
    return sum(len(example.prompt_ids) + len(example.answer_ids) for example in examples) / len(examples)


def model_size(config: Config, vocabulary: int | None = None) -> Size | None:
    """Return the model's size from its config alone; None where the config is out of reach.

    A new model has the ``vocabulary`` of its tokenizer.
    """
    import transformers

    try:
        model_config = load_model_config(config)
    except InputError:
        if config.config_name or find_path(config.model_name_or_path or ""):
            raise
        return None
    if config.config_name and vocabulary:
        model_config.vocab_size = vocabulary
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config)
    text = model_config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, text.num_hidden_layers, text.hidden_size)


def memory(config: Config, model: Size, length: float) -> float:
    """Estimate the bytes per device: weights, gradients, optimiser and activations.

    Activations take 34 bytes (bf16) per token, layer and hidden unit: Korthikanti et al. 2022 (arXiv 2205.05198),
    table 2, without attention scores, which SDPA does not keep. Gradient checkpointing keeps 2 of them, selective 20.
    """
    size = 2 if config.dtype == "bfloat16" else 4
    world, zero = dist.world_size(), config.zero_stage
    trained = model.parameters * (0.01 if config.use_peft else 1)
    moments = 8 if config.optim == "adamw_torch" else 4
    weights = model.parameters * (0.6 if config.load_in_4bit else size) / (world if zero == 3 else 1)
    if config.facts.has_teacher and not is_live(config) and not config.use_peft:
        weights *= 2
    gradients = trained * size / (world if zero >= 2 else 1)
    optimiser = trained * (moments + (4 if size == 2 else 0)) / (world if zero >= 1 else 1)
    tokens = 2 * config.per_device_train_batch_size * length
    kept = {False: 17, "selective": 10, True: 1}[config.gradient_checkpointing]
    kept *= not config.activation_offloading  # which moves them to host memory
    activations = tokens * model.layers * model.hidden * kept * size
    return weights + gradients + optimiser + activations


def rate_of(config: Config, encoder: Encoder, train: list[Example], size: Size) -> tuple[float, str]:
    """Return the operations per second of training, and how they were measured.

    A step of SFT is measured where the model is here and fits, else a matrix product.
    """
    policy = weights_at_hand(config)
    if dist.world_size() > 1:
        return matrix_rate(config), f"{BY_MATRICES}: one process alone measures a step"
    if config.resize_embeddings:
        return matrix_rate(config), f"{BY_MATRICES}: the model's embeddings are to be resized"
    if not policy and not config.config_name:
        return matrix_rate(config), f"{BY_MATRICES}: the model's weights are not here"
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if memory(config, size, mean_length(train)) > SAFE * room:
        return matrix_rate(config), f"{BY_MATRICES}: the model does not fit into {room / 2**30:.1f} GiB"
    return measured_rate(config, policy, encoder, train), "measured on a step of SFT of this model"


def weights_at_hand(config: Config) -> str | None:
    """Return the folder of the given model, or of its download from the hub; None where there is none."""
    import huggingface_hub

    name = config.model_name_or_path
    if name is None or find_path(name):
        return name
    try:
        folder = huggingface_hub.snapshot_download(name, revision=config.model_revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return folder if any(Path(folder).glob("*.safetensors")) else None


def measured_rate(config: Config, policy: str | None, encoder: Encoder, train: list[Example]) -> float:
    """Return the operations per second of the second step of SFT, with one micro-batch per step."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        if policy is None:
            policy = str(output / "initial")
            build_model(config, encoder.tokenizer, output / "initial")
        alone = dataclasses.replace(
            config, logging_steps=1, save_steps=0, gradient_accumulation_steps=1, profile=False, report_to=[]
        )
        init_process_group()
        run = Run(alone, output, policy, encoder, train, [], MetricsLog(output, alone), None)
        plan = plan_phase(
            alone, len(train), stage=None, epochs=None, steps=2, learning_rate=1e-9, optim=config.optim, seed=[0]
        )
        groups = [PromptGroup(example.prompt_ids, (example.answer_ids,)) for example in train]
        fit(run, output / "sft", policy, groups, sft_loss, plan)
        destroy_process_group()
        *_, (_, last) = read_jsonl(output / "metrics.jsonl")
        return last["tflops"] * 1e12


def matrix_rate(config: Config, size: int = 2048) -> float:
    """Return the operations per second that training may reach: a share of those of a square matrix product."""
    matrix = torch.randn(size, size, dtype=getattr(torch, config.dtype), device=dist.device())
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return EFFICIENCY * 2 * size**3 / best


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
