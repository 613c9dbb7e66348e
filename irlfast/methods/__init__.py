"""Methods: one algorithm per file, readable beside its paper. ``METHODS`` lists them as plain functions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from irlfast.config import Config
from irlfast.methods.dpo import dpo_stage
from irlfast.methods.irft import irft_phases, irft_stage
from irlfast.methods.reasoning import reasoning_asks, reasoning_phases, reasoning_stage
from irlfast.methods.reward import reward_asks, reward_phases, reward_stage
from irlfast.methods.rft import rft_asks, rft_phases, rft_stage
from irlfast.methods.sdft import sdft_phases, sdft_stage
from irlfast.methods.sft import sft_phases
from irlfast.methods.stages import Phase, stage_asks
from irlfast.methods.t_spin import t_spin_phases, t_spin_stage
from irlfast.runs.run import Run
from irlfast.sampling.generation import answer_in_background
from irlfast.sampling.shards import Request


class Method(NamedTuple):
    """A method's functions. :mod:`irlfast.config.methods` has its presets, and what it needs and leaves."""

    # Train one stage: (run, stage, policy, reference) -> the new policy, or the reward model. None for SFT alone.
    stage: Callable[[Run, int, Path | str, Path | str], Path | str] | None
    # List the phases of a whole run in order: (config, number of rows) -> phases. Where the policy answers prompts
    # without demonstrations, too, their number is a third argument.
    phases: Callable[..., Iterator[Phase]]
    # List the answers that a stage asks of the policy that it starts from: (run, stage) -> requests. They are sampled
    # together with the policy's held-out answers. A method that lists none samples all of them itself.
    asks: Callable[[Run, int], list[Request]] | None = None


METHODS: dict[str, Method] = {
    "irft": Method(irft_stage, irft_phases, stage_asks),
    "spin": Method(irft_stage, irft_phases, stage_asks),
    "t_spin": Method(t_spin_stage, t_spin_phases, stage_asks),
    "dpo": Method(dpo_stage, irft_phases),
    "rft": Method(rft_stage, rft_phases, rft_asks),
    "afd": Method(rft_stage, rft_phases, rft_asks),
    "gad": Method(rft_stage, rft_phases, rft_asks),
    "sdft": Method(sdft_stage, sdft_phases),
    "r_airl": Method(rft_stage, rft_phases, rft_asks),
    "reasoning": Method(reasoning_stage, reasoning_phases, reasoning_asks),
    "reward": Method(reward_stage, reward_phases, reward_asks),
    "sft": Method(None, sft_phases),
}


def phases_of(config: Config, rows: int, prompts: int) -> list[Phase]:
    """List the phases of a run on so many ``rows``, and on ``prompts`` without demonstrations."""
    return [*METHODS[config.method].phases(config, rows, *[prompts] * bool(prompts))]


def asks_of(run: Run, stage: int, early: bool = False) -> list[Request]:
    """List the answers that a stage, if there is one, asks of the policy that it starts from.

    With ``async_sampling``, a later stage than the first asks it about held-out prompts alone. The others are those
    that the stage asks of an ``early`` policy, while the stage before trains.
    """
    listed = METHODS[run.config.method].asks
    asks = listed(run, stage) if listed and stage < run.config.stages else []
    older = run.config.async_sampling and stage > 0
    return [request for request in asks if (older and request.examples is not run.held_out) == early]


def ask_early(run: Run, stage: int, policy: Path) -> None:
    """Have the early policy of a stage answer the prompts of the next stage in the background."""
    answer_in_background(policy, asks_of(run, stage + 1, early=True))
