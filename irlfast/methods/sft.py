"""Supervised fine-tuning: the whole of method ``sft``, and the warm start of the other methods."""

import functools
from array import array
from collections.abc import Iterator
from pathlib import Path

from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example
from irlfast.engine.fit import fit
from irlfast.engine.plan import Plan, plan_phase
from irlfast.losses.sft import sft_loss
from irlfast.methods.stages import Phase
from irlfast.runs.run import Run


def sft(run: Run, policy: Path | str) -> Path:
    """Maximise the likelihood of the demonstrations, which minimises KL(π_E ‖ π_θ). Return the new policy."""
    groups = [group_of(example) for example in run.train]
    loss = functools.partial(sft_loss, remaining=run.config.token_weighting == "remaining")
    return fit(run, run.output / "sft", policy, groups, loss, sft_plan(run.config, len(groups)))


def group_of(example: Example) -> PromptGroup:
    """Make the prompt group of an example. If earlier answers are learned, too, its answer begins at the first one."""
    if not len(example.earlier):
        return PromptGroup(example.prompt_ids, (example.answer_ids,))
    first, prompt = max(1, example.earlier[0]), len(example.prompt_ids)
    rest = array("i", [*example.prompt_ids[first:], *example.answer_ids])
    learned = [at - first for at in [*example.earlier, *range(prompt, prompt + len(example.answer_ids))] if at >= first]
    return PromptGroup(example.prompt_ids[:first], (rest,), learned=learned)


def sft_plan(config: Config, count: int) -> Plan:
    """Plan the steps of SFT over ``count`` prompt groups."""
    return plan_phase(
        config,
        count,
        stage=None,
        epochs=config.sft_epochs,
        steps=config.sft_steps,
        learning_rate=config.sft_learning_rate or config.at("learning_rate", 0),
        optim=config.sft_optim or config.optim,
        seed=[0],
        micro_batch=config.sft_per_device_train_batch_size,
    )


def wants_sft(config: Config) -> bool:
    return bool(config.sft_epochs or config.sft_steps)


def sft_phases(config: Config, rows: int) -> Iterator[Phase]:
    """List the phase of SFT on ``rows`` demonstrations, if the configuration asks for SFT."""
    if wants_sft(config):
        yield Phase("sft", functools.partial(sft_plan, config, rows), answers=1, sampled=0, files=("sft/eval.json",))
