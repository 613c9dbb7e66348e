"""Print a plan: the estimates of ``irlfast plan`` and of ``irlfast train --dry_run``."""

import datetime
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from irlfast.common.files import InputError, free_bytes, home_path
from irlfast.common.printable import printable
from irlfast.common.time_left import duration
from irlfast.config import Config
from irlfast.data.sets import read_sets
from irlfast.data.sources import locate, sources_of
from irlfast.engine.hardware import Cluster
from irlfast.methods import phases_of
from irlfast.startup.calibration import rates_here, rates_of_run, room_here
from irlfast.startup.disk import disk_needs, gigabytes, most
from irlfast.startup.limits import check_async_sampling_on_gpus
from irlfast.startup.plan_memory import Room, gib, misfit, total
from irlfast.startup.plan_run import Planned, Work, plan_run, work_of
from irlfast.startup.plan_seconds import Rates, assumed_rates
from irlfast.startup.prepare import read_encoder
from irlfast.startup.sizes import Size, model_size


def show_plan(config: Config, cluster: Cluster | None, processes: int, run: Path | None) -> None:
    """Print the plan of a run on a cluster, or in ``processes`` of this machine; ``run`` gives measured rates.

    Raises:
        InputError: the model's config is out of reach, there are no rows to plan with, vLLM would sample beside
            training on the GPUs that train, or the run does not fit.
    """
    out = Console(highlight=False, soft_wrap=True)
    work, vocabulary = read_work(config)
    size = model_size(config, vocabulary)
    if size is None:
        raise InputError(f"model_name_or_path {config.model_name_or_path}: its config.json cannot be had here")
    if not work.rows:
        raise InputError("max_train_samples: found none, and the data cannot be read here; expected a number of rows")
    if cluster:
        rates = assumed_rates(cluster, config)
        room = Room(cluster.gpu.memory, processes, on_gpu=True, runtime=rates.runtime)
    else:
        rates, room = rates_here(config, processes), room_here(processes)
    if run:
        rates = rates_of_run(run, rates, processes, room.on_gpu)
        room = room if room.on_gpu else room._replace(runtime=rates.runtime)
    check_async_sampling_on_gpus(config, room.on_gpu)
    title(out, "model", *size_lines(size), "")
    title(out, "work", *work_lines(work), "")
    show_estimates(out, config, size, room, rates, work)


def read_work(config: Config) -> tuple[Work, int | None]:
    """Return the work of a run, and the vocabulary of its tokenizer: measured where the data are here, else bounds."""
    if not all(locate(source.name) for source in sources_of(config)):
        return work_of(config, None), None
    try:
        encoder = read_encoder(config, datetime.datetime.now())
    except InputError:  # no tokenizer here
        return work_of(config, None), None
    return work_of(config, read_sets(config, encoder)), len(encoder.tokenizer)


def title(out: Console, name: str, *lines: str) -> None:
    """Print a title and lines of plain text; rich's markup in them is text, too."""
    out.print(name, style="bold", markup=False)
    for line in lines:
        out.print(Text(printable(line, keep="\n")))


def show_estimates(out: Console, config: Config, size: Size, room: Room, rates: Rates, work: Work) -> None:
    """Print the phases, the memory and the disk of a run.

    Raises:
        InputError: the run does not fit; the message names the part, and the first key that helps.
    """
    plan = plan_run(config, size, room, rates, work)
    title(out, "phases", *phase_lines(plan, rates, work), "")
    title(out, "memory", *memory_lines(plan), "")
    needs = disk_needs(config, size, work.lengths.prompt + work.lengths.answer, work.rows, work.prompts)
    output = home_path(config.output_dir)
    disk = [f"{need.phase}: {gigabytes(need.work)} at most, of which {gigabytes(need.left)} stay" for need in needs]
    at_most = f"at most {gigabytes(most(needs))} in {output}, where {gigabytes(free_bytes(output))} are free"
    title(out, "disk", *disk, at_most)
    if lack := misfit(config, room, plan.memory, work.longest):
        raise InputError(lack)


def show_steps(out: Console, config: Config, work: Work) -> None:
    """Print the steps of a run whose model is unknown."""
    planned = [(phase.name, phase.plan().steps) for phase in phases_of(config, work.rows, work.prompts)]
    title(out, "phases", *(f"{name}: {len(steps):,} optimiser steps of {steps[0].size}" for name, steps in planned))


# ---------------------------------------------------------------- lines


def size_lines(size: Size) -> Iterator[str]:
    yield f"{size.parameters:,} parameters, {size.trained:,} of them trained, in {size.layers} layers"


def work_lines(work: Work) -> Iterator[str]:
    prompt, answer, sampled = work.lengths
    yield f"{work.rows:,} demonstrations, {work.prompts:,} prompts, {work.held_out:,} held out"
    known = "on average" if work.measured else "the limits of the keys, as the data cannot be read here"
    yield f"{prompt:,.0f} tokens per prompt, {answer:,.0f} per answer, {sampled:,.0f} per sampled answer ({known})"


def phase_lines(plan: Planned, rates: Rates, work: Work) -> Iterator[str]:
    """List the phases, each with the parts of its time and of a step's."""
    processes, device = plan.room.processes, "GPU" if plan.room.on_gpu else "process"
    yield f"at most; {processes} process{'es' * (processes > 1)}, {rates.training / 1e12:.3f} TFLOP/s, {rates.source}"
    for phase in plan.phases:
        seconds = sum(phase.seconds.values())
        yield f"{phase.name}: {phase.steps:,} optimiser steps of {phase.groups}, about {duration(seconds)}"
        yield f"    {', '.join(f'{part} {duration(value)}' for part, value in phase.seconds.items() if value)}"
        if phase.beside:
            yield f"    {duration(phase.beside)} more of sampling, beside the training of the stage before"
        step = ", ".join(f"{part} {value:.2g} s" for part, value in phase.step.items() if value)
        yield f"    a step {sum(phase.step.values()):.2g} s: {step}"
    hours = plan.seconds() / 3600
    yield f"in all about {duration(plan.seconds())}: {hours * processes:,.1f} {device}-hours"


def memory_lines(plan: Planned) -> Iterator[str]:
    """List the parts of each moment. The moments come one after the other."""
    for moment, parts in plan.memory.items():
        listed = ", ".join(f"{part} {gib(count)}" for part, count in parts.items() if count)
        yield f"{moment}: {gib(total(parts))} per device ({listed})"
    if plan.copied:
        yield f"host memory while a checkpoint is written (async_save): {gib(plan.copied)} more per process"
    yield f"in training with up to {plan.tokens:,} tokens per batch, of {gib(plan.room.memory)}"
