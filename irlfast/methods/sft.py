"""Supervised fine-tuning: method ``sft``, and the warm start of the others."""

import functools
from array import array
from pathlib import Path

from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example
from irlfast.engine.fit import fit
from irlfast.engine.plan import Plan, plan_phase
from irlfast.losses.sft import sft_loss
from irlfast.runs.run import Run


def sft(run: Run, policy: Path | str) -> Path:
    """Maximum likelihood of the demonstrations: minimises KL(π_E ‖ π_θ)."""
    groups = [group_of(example) for example in run.train]
    loss = functools.partial(sft_loss, remaining=run.config.token_weighting == "remaining")
    return fit(run, run.output / "sft", policy, groups, loss, sft_plan(run.config, len(groups)))


def group_of(example: Example) -> PromptGroup:
    """The answer after its prompt; where earlier answers are learned, all from the first of them on."""
    if not len(example.earlier):
        return PromptGroup(example.prompt_ids, (example.answer_ids,))
    first, prompt = max(1, example.earlier[0]), len(example.prompt_ids)
    rest = array("i", [*example.prompt_ids[first:], *example.answer_ids])
    learned = [at - first for at in [*example.earlier, *range(prompt, prompt + len(example.answer_ids))] if at >= first]
    return PromptGroup(example.prompt_ids[:first], (rest,), learned=learned)


def sft_plan(config: Config, count: int) -> Plan:
    return plan_phase(
        config,
        count,
        stage=None,
        epochs=sft_epochs(config),
        steps=config.sft_steps,
        learning_rate=config.sft_learning_rate or config.at("learning_rate", 0),
        optim=config.sft_optim or config.optim,
        seed=[0],
        micro_batch=config.sft_per_device_train_batch_size,
    )


def sft_epochs(config: Config) -> float:
    """Passes of SFT where no steps are given: one for method ``sft``, none before the others."""
    return float(config.method == "sft") if config.sft_epochs is None else config.sft_epochs


def wants_sft(config: Config) -> bool:
    return bool(sft_epochs(config) or config.sft_steps)
