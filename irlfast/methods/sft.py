"""Supervised fine-tuning: the whole of method ``sft``, and the warm start of the other methods."""

import functools
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from irlfast.config import Config
from irlfast.data.packing import PromptGroup, learned
from irlfast.data.store import Example, Mapped
from irlfast.engine.fit import fit
from irlfast.engine.plan import Plan, plan_phase
from irlfast.losses.sft import SFT_LOSSES, sft_loss
from irlfast.methods.stages import Phase, wants_sft
from irlfast.runs.run import Run
from irlfast.sampling.scoring import score
from irlfast.sampling.thoughts import with_thoughts


def sft(run: Run, policy: Path | str) -> Iterator[tuple[str, Path]]:
    """Train on the demonstrations, if the configuration asks for it. Yield each phase with the new policy."""
    config = run.config
    if not wants_sft(config):
        return
    groups: Sequence[PromptGroup] = Mapped(group_of, with_thoughts(run) if config.facts.thinks else run.train)
    loss = functools.partial(sft_loss, remaining=config.token_weighting == "remaining")
    if config.sft_nll_steps:
        policy = fit(run, run.output / "sft-nll", policy, groups, loss, nll_plan(config, len(groups)))
        yield "sft-nll", policy
    folder, kind = run.output / "sft", SFT_LOSSES[config.sft_loss_type]
    if kind.scores_reference:
        groups = with_reference(run, policy, groups, folder / "reference.safetensors")
    loss = functools.partial(
        loss, loss_type=config.sft_loss_type, clip_range=config.cliprange, kl_weight=config.sft_kl_weight
    )
    teacher = policy if kind.teacher else None
    yield "sft", fit(run, folder, policy, groups, loss, sft_plan(config, len(groups)), teacher)


def group_of(example: Example) -> PromptGroup:
    """Make the prompt group of an example. If earlier answers are learned, too, its answer begins at the first one."""
    if not len(example.earlier):
        return PromptGroup(example.prompt_ids, (example.answer_ids,), row=example.row)
    first, prompt = max(1, example.earlier[0]), len(example.prompt_ids)
    rest = array("i", [*example.prompt_ids[first:], *example.answer_ids])
    tokens = [*example.earlier, *range(prompt, prompt + len(example.answer_ids))]
    kept = [at - first for at in tokens if at >= first]
    return PromptGroup(example.prompt_ids[:first], (rest,), learned=kept, row=example.row)


def with_reference(run: Run, reference: Path | str, groups: Sequence[PromptGroup], path: Path) -> Sequence[PromptGroup]:
    """Add the reference's log-probabilities of the tokens that are learned. They are kept in the file ``path``."""

    def scored(group: PromptGroup, logps: tuple[Tensor]) -> PromptGroup:
        return group._replace(ref_logps=(logps[0][list(learned(range(len(logps[0])), group))],))

    return Mapped(scored, groups, score(run, reference, groups, path, in_4bit=run.config.load_in_4bit))


def sft_plan(config: Config, count: int) -> Plan:
    """Plan the steps of SFT over ``count`` prompt groups."""
    return plan_sft(config, count, config.sft_epochs, config.sft_steps, seed=[0])


def nll_plan(config: Config, count: int) -> Plan:
    """Plan the steps of plain SFT that come before, over ``count`` prompt groups."""
    return plan_sft(config, count, None, config.sft_nll_steps, seed=[0, 1])


def plan_sft(config: Config, count: int, epochs: float | None, steps: int | None, seed: list[int]) -> Plan:
    return plan_phase(
        config,
        count,
        stage=None,
        epochs=epochs,
        steps=steps,
        learning_rate=config.sft_learning_rate or config.at("learning_rate", 0),
        optim=config.sft_optim or config.optim,
        seed=seed,
        batch_size=config.sft_global_batch_size,
    )


def sft_phases(config: Config, rows: int) -> Iterator[Phase]:
    """List the phases of SFT on ``rows`` demonstrations, if the configuration asks for SFT."""
    plans = {"sft-nll": nll_plan, "sft": sft_plan} if config.sft_nll_steps else {"sft": sft_plan}
    for name, plan in plans.items() if wants_sft(config) else ():
        yield Phase(name, functools.partial(plan, config, rows), answers=1, sampled=0, files=(f"{name}/eval.json",))
