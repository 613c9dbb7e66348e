"""``--dry_run``: the resolved configuration, examples with the loss mask made visible, steps, memory and time."""

import dataclasses
import datetime
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from irlfast.common import dist
from irlfast.common.files import InputError, find_path, read_jsonl
from irlfast.common.printable import printable
from irlfast.config import Config, dump
from irlfast.data.encoding import Encoder
from irlfast.data.packing import PromptGroup
from irlfast.data.sets import read_sets
from irlfast.data.sources import locate, sources_of
from irlfast.data.store import NONE, Examples, Mapped
from irlfast.engine.deepspeed_engine import check_deepspeed
from irlfast.engine.fit import fit
from irlfast.engine.memory import first_groups
from irlfast.engine.plan import plan_phase
from irlfast.engine.process_group import destroy_process_group, init_process_group
from irlfast.losses.sft import sft_loss
from irlfast.models.build import build_model
from irlfast.runs.metrics_log import MetricsLog
from irlfast.runs.run import Run
from irlfast.startup.calibration import rates_here, room_here, training_rate
from irlfast.startup.data import describe
from irlfast.startup.limits import check_sizes
from irlfast.startup.plan_memory import gib, most, training_memory
from irlfast.startup.plan_run import work_of
from irlfast.startup.plan_seconds import Rates, updated_bytes
from irlfast.startup.plan_show import show_estimates, show_steps, size_lines, title
from irlfast.startup.prepare import check_model, check_rows, quiet, read_encoder
from irlfast.startup.sizes import Size, mean_length, model_size

EXAMPLES = 3
SAFE = 0.8  # share of the free memory that a model may take for a measured step


def show(config: Config) -> None:
    """Print what a run would do. Parts that need a download which is out of reach are named and left out."""
    quiet()
    out = Console(highlight=False, soft_wrap=True)
    title(out, "configuration", dump(config))
    size, sets, encoder = model_size(config), None, None
    if size:
        check_model(config)
        check_deepspeed(config)
    try:
        encoder = read_encoder(config, datetime.datetime.now())
        read = read_sets(config, encoder)
        if config.model_name_or_path:
            check_rows(config, encoder, *read[:3])
        check_sizes(config, *read[:3])
        title(out, "data", *map(printable, describe(read)), "")
        show_examples(out, read.train[:EXAMPLES], encoder)
        sets, size = read, model_size(config, len(encoder.tokenizer))
    except InputError as error:
        if size and all(locate(source.name) for source in sources_of(config)):
            raise  # nothing is missing here, so the data is wrong
        title(out, "data", f"not checked: {printable(error)}", "")
    title(out, "model", *(size_lines(size) if size else ["cannot be had here"]), "")
    work = work_of(config, sets)
    if not work.rows:
        out.print("steps: unknown without the data; max_train_samples gives a bound")
    elif size is None:
        show_steps(out, config, work)
    else:
        processes = dist.world_size()
        rates = measured_rates(config, encoder, sets.train, size) if sets else rates_here(config, processes)
        show_estimates(out, config, size, room_here(processes), rates, work)


def show_examples(out: Console, examples: Examples, encoder: Encoder) -> None:
    out.print("[bold]examples[/] (the loss is on the tokens in ⟦ ⟧ alone)")
    for example in examples:
        texts = [encoder.tokenizer.decode(ids.tolist()) for ids in (example.prompt_ids, example.answer_ids)]
        prompt, answer = (printable(text, keep="\n\t") for text in texts)
        out.print(Text.assemble((prompt, "dim"), (f"⟦{answer}⟧", "green")))
        out.print(f"[dim]{len(example.prompt_ids)} prompt tokens + {len(example.answer_ids)} answer tokens[/]\n")


def measured_rates(config: Config, encoder: Encoder | None, train: Examples, size: Size) -> Rates:
    """Return the rates of this machine: those of a step of SFT where the model is here and fits, else of a product."""
    here = rates_here(config, dist.world_size())
    if why := why_unmeasured(config, train, size):
        return here._replace(source=f"{here.source}: {why}")
    assert encoder
    return rates_of_step(config, weights_at_hand(config), encoder, train, size, here)


def why_unmeasured(config: Config, train: Examples, size: Size) -> str:
    """Return why no step of the model can be measured here, or ""."""
    if dist.world_size() > 1:
        return "one process alone measures a step"
    if config.resize_embeddings:
        return "the model's embeddings are to be resized"
    if config.allow_missing_weights:
        return "the model may lack weights"
    if not weights_at_hand(config) and not config.config_name:
        return "the model's weights are not here"
    room = room_here(1)
    tokens = round(first_groups(config.global_batch_size) * mean_length(train))
    if most(training_memory(config, size, room, tokens)) > SAFE * room.memory:
        return f"the model does not fit into {gib(room.memory)}"
    return ""


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


def rates_of_step(
    config: Config, policy: str | None, encoder: Encoder, train: Examples, size: Size, here: Rates
) -> Rates:
    """Return the rates of the second step of SFT, with one micro-batch per step."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        if policy is None:
            policy = str(output / "initial")
            build_model(config, encoder.tokenizer, output / "initial")
        batch = first_groups(config.global_batch_size)
        alone = dataclasses.replace(
            config, logging_steps=1, save_steps=0, global_batch_size=batch, profile=False, report_to=[]
        )
        init_process_group()
        run = Run(alone, output, policy, encoder, train, NONE, MetricsLog(output, alone), None)
        plan = plan_phase(
            alone, len(train), stage=None, epochs=None, steps=2, learning_rate=1e-9, optim=config.optim, seed=[0]
        )
        groups = Mapped(lambda example: PromptGroup(example.prompt_ids, (example.answer_ids,)), train)
        fit(run, output / "sft", policy, groups, sft_loss, plan)
        destroy_process_group()
        *_, (_, row) = read_jsonl(output / "metrics.jsonl")
    return here._replace(
        training=training_rate(row, config, size, 1),
        memory=updated_bytes(config, size, 1, config.optim) / (row["seconds"] * row["time/optimizer"]),
        source="measured on a step of SFT of this model",
    )
