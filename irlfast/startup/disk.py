"""The bytes that a run writes to its folder, estimated before each phase and compared with the free space.

A phase leaves samples, scores and a policy. While it trains, it also has its checkpoint, and a second one while the
newer replaces the older. ``final/`` has hard links to the weights of its policy, where the file system has links; an
adapter is merged into its base there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from irlfast.common import dist
from irlfast.common.files import InputError, free_bytes, has_links
from irlfast.config import Config
from irlfast.engine.optim import STATE_BYTES
from irlfast.engine.plan import Plan
from irlfast.engine.teacher import is_live
from irlfast.methods import phases_of
from irlfast.methods.stages import Phase, stage_name
from irlfast.runs.run import Run
from irlfast.startup.sizes import Size, bytes_of, mean_length, model_size

PER_TOKEN = 22  # bytes of a token of a sampled answer: about 4 of text, 6 of its number, 12 of its log-probability
SMALL = 20_000  # bytes of the configurations and the tokenizer beside a model's weights
REPORT = 1_000_000  # bytes of report.html


class Need(NamedTuple):
    """The bytes that a phase needs on disk."""

    phase: str
    work: int  # at most while it runs, beyond what earlier phases have left
    left: int  # afterwards, less the older policy that is deleted then


def plan_disk(run: Run) -> list[Need]:
    """Return the needs of the run's phases; none where the model's config is out of reach."""
    size = model_size(run.config, len(run.encoder.tokenizer), passes=False)
    if size is None:
        return []
    rows, prompts, linked = len(run.train), len(run.prompts), has_links(run.output)
    return disk_needs(run.config, size, mean_length(run.train), rows, prompts, linked)


def disk_needs(config: Config, size: Size, length: float, rows: int, prompts: int, linked: bool = True) -> list[Need]:
    """Estimate what each phase of a run on so many ``rows`` and ``prompts`` needs, and what its end does.

    ``length`` is the mean number of tokens of a prompt and its answer. ``linked`` says whether the file system has hard
    links.
    """
    needs = [need_of(config, phase, size, length) for phase in phases_of(config, rows, prompts)]
    weights = 0 if linked and not config.use_peft else size.parameters * bytes_of(config)
    final = weights + SMALL + REPORT
    return [*needs, Need("final", final, final)]


def need_of(config: Config, phase: Phase, size: Size, length: float) -> Need:
    plan = phase.plan()
    texts = phase.sampled * (length + config.max_new_tokens) * PER_TOKEN
    scores = 4 * len(plan.steps) * plan.steps[0].size * phase.answers * length
    teachers = int(config.facts.has_teacher and plan.stage is not None and not is_live(config))
    copies = 1 + teachers + (plan.early is not None)
    models = ((size.parameters if plan.reward else size.trained) * bytes_of(config) + SMALL) * copies
    checkpoint = checkpoint_bytes(plan, size) + 4 * size.trained * teachers
    saves = (len(plan.steps) - 1) // config.save_steps if config.save_steps else 0
    work = texts + scores + max(checkpoint * min(saves, 2), checkpoint * min(saves, 1) + models)
    # Beside the policies of the last stages, save_total_limit keeps that of the best phase.
    stage, limit = plan.stage or 0, config.save_total_limit
    deletes = limit and stage > limit and phase.name == stage_name(stage)
    return Need(phase.name, int(work), int(texts + scores + models * (not deletes)))


def checkpoint_bytes(plan: Plan, size: Size) -> int:
    """Return the bytes of a checkpoint: fp32 weights, and the optimiser's state."""
    return size.trained * (4 + STATE_BYTES[plan.optim])


def most(needs: Sequence[Need]) -> int:
    """Return the most bytes that the phases have on disk at any time."""
    before, peak = 0, 0
    for need in needs:
        peak = max(peak, before + need.work)
        before += need.left
    return peak


def check_room(output: Path, needs: Sequence[Need]) -> None:
    """Check, in every process, that the phases which are not done fit onto the disk.

    Raises:
        InputError: they do not; the message says which phase has the most, and what needs less.
    """
    if lack := dist.on_main(lack_of_room, output, needs):
        raise InputError(lack)


def lack_of_room(output: Path, needs: Sequence[Need]) -> str:
    """Return a sentence if the phases that are not done do not fit beside what they have written already, or ""."""
    done = [need for need in needs if (output / need.phase / "DONE").exists()]
    ahead = [need for need in needs if need not in done]
    there = files_of_phases(output, ahead) - files_of_phases(output, done)  # a stage's folder has those of its rewards
    missing, free = most(ahead) - sum(path.stat().st_size for path in there), free_bytes(output)
    if missing <= free:
        return ""
    largest = max(ahead, key=lambda need: need.work)
    return (
        f"output_dir {output}: {gigabytes(free)} are free, but the run has up to {gigabytes(missing)} more there, "
        f"{gigabytes(largest.work)} of them during {largest.phase}; expected more room, or a smaller "
        "save_total_limit, save_steps: 0 (no checkpoints), fewer stages, or use_peft (adapters as policies)"
    )


def files_of_phases(output: Path, needs: Sequence[Need]) -> set[Path]:
    return {path for need in needs for path in (output / need.phase).rglob("*") if path.is_file()}


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
