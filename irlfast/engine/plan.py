"""A phase's plan: which prompt groups each optimiser step takes, and the optimiser's settings."""

from typing import Any, NamedTuple

import numpy as np

from irlfast.common import dist
from irlfast.config import Config
from irlfast.data.batching import plan_steps


class Plan(NamedTuple):
    stage: int | None  # None for SFT
    steps: list[np.ndarray]  # per optimiser step, the numbers of its prompt groups [micro_batch * accumulation * ranks]
    micro_batch: int  # prompt groups per device and micro-step
    learning_rate: float
    optim: str
    reward: dict[str, Any] | None = None  # how the reward model in training is scored; None for a policy


def plan_phase(
    config: Config,
    count: int,
    *,
    stage: int | None,
    epochs: float | None,
    steps: int | None,
    learning_rate: float,
    optim: str,
    seed: list[int],
    micro_batch: int | None = None,
    reward: dict[str, Any] | None = None,
) -> Plan:
    """Plan ``steps`` optimiser steps, or as many as ``epochs`` take, over ``count`` prompt groups."""
    micro_batch = micro_batch or config.per_device_train_batch_size
    batch = micro_batch * config.gradient_accumulation_steps * dist.world_size()
    chosen = plan_steps(count, batch, epochs=epochs, steps=steps, seed=[config.seed, *seed])
    return Plan(stage, chosen, micro_batch, learning_rate, optim, reward)
