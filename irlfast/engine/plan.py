"""A phase's plan: which prompt groups each optimiser step takes, and the optimiser's settings."""

from typing import Any, NamedTuple

import numpy as np

from irlfast.config import Config
from irlfast.data.batching import plan_steps


class Plan(NamedTuple):
    stage: int | None  # None for SFT
    steps: list[np.ndarray]  # per optimiser step, the numbers of its prompt groups [batch_size], of all processes
    learning_rate: float
    optim: str
    reward: dict[str, Any] | None = None  # how the reward model in training is scored; None for a policy
    lower_after: int | None = None  # the step after which the learning rate is lower; None: it never is
    early: int | None = None  # the step after which the policy is also saved to answer the next stage's prompts


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
    batch_size: int | None = None,
    reward: dict[str, Any] | None = None,
) -> Plan:
    """Plan ``steps`` optimiser steps, or as many as ``epochs`` take, over ``count`` prompt groups.

    A step takes ``batch_size`` groups, or else ``global_batch_size``. The number of processes changes no step.
    """
    batch = batch_size or config.global_batch_size
    chosen = plan_steps(count, batch, epochs=epochs, steps=steps, seed=[config.seed, *seed])
    return Plan(stage, chosen, learning_rate, optim, reward)
