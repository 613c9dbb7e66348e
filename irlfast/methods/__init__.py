"""Methods: one algorithm per file, readable beside its paper. ``METHODS`` lists them as plain functions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from irlfast.methods.dpo import dpo_stage
from irlfast.methods.irft import irft_phases, irft_stage
from irlfast.methods.reasoning import reasoning_phases, reasoning_stage
from irlfast.methods.reward import reward_phases, reward_stage
from irlfast.methods.rft import rft_phases, rft_stage
from irlfast.methods.sdft import sdft_phases, sdft_stage
from irlfast.methods.sft import sft_phases
from irlfast.methods.stages import Phase
from irlfast.methods.t_spin import t_spin_phases, t_spin_stage
from irlfast.runs.run import Run


class Method(NamedTuple):
    """A method's functions. :mod:`irlfast.config.methods` has its presets, and what it needs and leaves."""

    # Train one stage: (run, stage, policy, reference) -> the new policy, or the reward model. None for SFT alone.
    stage: Callable[[Run, int, Path | str, Path | str], Path | str] | None
    # List the phases of a whole run in order: (config, number of rows) -> phases. Where the policy answers prompts
    # without demonstrations, too, their number is a third argument.
    phases: Callable[..., Iterator[Phase]]


METHODS: dict[str, Method] = {
    "irft": Method(irft_stage, irft_phases),
    "spin": Method(irft_stage, irft_phases),
    "t_spin": Method(t_spin_stage, t_spin_phases),
    "dpo": Method(dpo_stage, irft_phases),
    "rft": Method(rft_stage, rft_phases),
    "afd": Method(rft_stage, rft_phases),
    "gad": Method(rft_stage, rft_phases),
    "sdft": Method(sdft_stage, sdft_phases),
    "r_airl": Method(rft_stage, rft_phases),
    "reasoning": Method(reasoning_stage, reasoning_phases),
    "reward": Method(reward_stage, reward_phases),
    "sft": Method(None, sft_phases),
}
