"""``--dry_run``: the resolved configuration, examples with the loss mask made visible, steps, memory and time."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

from irlfast import dist
from irlfast.config import Config, dump
from irlfast.data import Example, Format
from irlfast.engine import Plan
from irlfast.files import InputError, find
from irlfast.methods.irft import irft_plan, stage_name
from irlfast.methods.reward import reward_plan
from irlfast.methods.rft import round_name
from irlfast.methods.sft import sft_plan, wants_sft
from irlfast.model import load_model_config
from irlfast.prepare import check_model, describe, quiet, read_data

EXAMPLES = 3
EFFICIENCY = 0.4  # of the measured matrix-product rate that a whole training step reaches


class Size(NamedTuple):
    parameters: int
    layers: int
    hidden: int


def show(config: Config) -> None:
    """Print what a run would do, and stop. What needs a download that cannot be had is named and left out."""
    quiet()
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"[bold]configuration[/]\n{escape(dump(config))}")
    size, train = model_size(config), None
    if size:
        check_model(config)
    try:
        form, train, _, counts = read_data(config)
        out.print(f"[bold]data[/]\n{describe(counts)}\n")
        show_examples(out, train[:EXAMPLES], form)
        size = model_size(config, len(form.tokenizer))
    except InputError as error:
        if find(config.dataset_name or "") and size:  # all is at hand, so the data is wrong
            raise
        out.print(f"[bold]data[/]\nnot checked: {escape(str(error))}\n")
    out.print(f"[bold]model[/]\n{size.parameters:,} parameters\n" if size else "[bold]model[/]\ncannot be had here\n")
    show_estimates(out, config, train, size)


def show_examples(out: Console, examples: list[Example], form: Format) -> None:
    out.print("[bold]examples[/] (the loss is on the tokens in ⟦ ⟧ alone)")
    for example in examples:
        prompt, answer = (
            escape(form.tokenizer.decode(ids.tolist())) for ids in (example.prompt_ids, example.answer_ids)
        )
        out.print(f"[dim]{prompt}[/][green]⟦{answer}⟧[/]")
        out.print(f"[dim]{len(example.prompt_ids)} prompt tokens + {len(example.answer_ids)} answer tokens[/]\n")


def show_estimates(out: Console, config: Config, train: list[Example] | None, size: Size | None) -> None:
    rows = len(train) if train else config.max_train_samples
    if not rows:
        out.print("steps: unknown without the data; max_train_samples gives a bound")
        return
    length = mean_length(train) if train else float(config.max_length)
    rate = matrix_rate(config)
    length_note = f"{length:.0f} tokens a sequence" + ("" if train else " (max_length)")
    out.print(
        f"[bold]phases[/] (at most; {dist.world_size()} process, {length_note}; "
        f"{EFFICIENCY:.0%} of this machine's {rate / 1e12:.2f} TFLOP/s)"
    )
    for name, plan, answers, pairs in phases(config, rows):
        sequences = len(plan.steps) * plan.steps[0].size * answers
        line = f"{name}: {len(plan.steps):,} optimiser steps of {plan.steps[0].size}, {sequences:,} sequences"
        if size:
            operations = size.parameters * length * (6 * sequences + 4 * pairs + 2 * pairs)  # train, score both, sample
            line += f", about {duration(operations / (EFFICIENCY * rate) / dist.world_size())}"
        out.print(line)
    if size:
        out.print(f"\n[bold]memory[/]\nabout {memory(config, size, length) / 2**30:.2f} GiB a device in training")


def phases(config: Config, rows: int) -> Iterator[tuple[str, Plan, int, int]]:
    """Every phase's name, plan, answers a segment, and pairs to sample and score."""
    if wants_sft(config):
        yield "sft", sft_plan(config, rows), 1, 0
    if config.method in ("rft", "afd", "reward"):
        yield from reward_phases(config, rows)
        return
    for stage in range(0 if config.method == "sft" else config.stages):
        pairs = sum(stage_size(config, rows, earlier) for earlier in range(max(0, stage - config.history), stage + 1))
        yield stage_name(stage), irft_plan(config, stage, pairs), 2, pairs


def reward_phases(config: Config, rows: int) -> Iterator[tuple[str, Plan, int, int]]:
    """Those of methods that learn a reward."""
    for stage in range(config.stages):
        size = stage_size(config, rows, stage)
        if config.reward_data == "policy_demo" or (config.reward_data != "none" and not stage):
            yield f"{stage_name(stage)}/reward", reward_plan(config, stage, size), 2, size
        answers = config.num_generations
        if config.method != "reward":
            for number in range(config.align_rounds):
                share = len(range(number, size, config.align_rounds))
                trained = 1 if config.align == "bon" else answers
                yield round_name(config, stage, number), irft_plan(config, stage, share), trained, share * answers


def stage_size(config: Config, rows: int, stage: int) -> int:
    return rows if config.prompts_per_stage == "all" else len(range(stage, rows, config.stages))


def mean_length(examples: list[Example]) -> float:
    return sum(len(example.prompt_ids) + len(example.answer_ids) for example in examples) / len(examples)


def model_size(config: Config, vocabulary: int | None = None) -> Size | None:
    """From the model's config alone, a new model's with its tokenizer's ``vocabulary``; None where it cannot be had."""
    import transformers

    try:
        model_config = load_model_config(config)
    except InputError:
        if config.config_name or find(config.model_name_or_path or ""):
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
    """Bytes a device: weights, gradients, optimiser, and activations at 34 bytes (bf16) a token, layer and unit.

    The activations are Korthikanti et al. 2022 (arXiv 2205.05198), table 2, without attention scores, which SDPA
    does not keep; gradient checkpointing keeps 2 bytes a token, layer and unit, selective 20.
    """
    size = 2 if config.dtype == "bfloat16" else 4
    world, zero = dist.world_size(), config.zero_stage
    trained = model.parameters * (0.01 if config.use_peft else 1)
    moments = 8 if config.optim == "adamw_torch" else 4
    weights = model.parameters * (0.6 if config.load_in_4bit else size) / (world if zero == 3 else 1)
    gradients = trained * size / (world if zero >= 2 else 1)
    optimiser = trained * (moments + (4 if size == 2 else 0)) / (world if zero >= 1 else 1)
    tokens = 2 * config.per_device_train_batch_size * length
    kept = {False: 17, "selective": 10, True: 1}[config.gradient_checkpointing]
    kept *= not config.activation_offloading  # it is host memory that takes them then
    activations = tokens * model.layers * model.hidden * kept * size
    return weights + gradients + optimiser + activations


def matrix_rate(config: Config, size: int = 2048) -> float:
    """Operations a second of a square matrix product in the run's dtype on this machine."""
    matrix = torch.randn(size, size, dtype=getattr(torch, config.dtype), device=dist.device())
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
