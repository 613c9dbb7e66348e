"""The optimiser and the learning-rate schedule of a phase."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from irlfast.config import Config
from irlfast.engine.plan import Plan
from irlfast.optim import FusedRMSprop

OPTIMIZERS = {"rmsprop": FusedRMSprop, "adamw_torch": torch.optim.AdamW}
STATE_BYTES = {"rmsprop": 4, "adamw_torch": 8}  # of the optimiser's state per trained parameter
LOWER = 0.1  # what multiplies the learning rate after Plan.lower_after


def make_optimizer(model: torch.nn.Module, plan: Plan, config: Config) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OPTIMIZERS[plan.optim](parameters, lr=plan.learning_rate, weight_decay=config.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, plan: Plan, config: Config) -> Any:
    steps = len(plan.steps)
    return transformers.get_scheduler(
        config.lr_scheduler_type, optimizer, round(config.warmup_ratio * steps), num_training_steps=steps
    )


def continue_schedule(scheduler: Any, step: int) -> None:
    """Set the learning rate's schedule to where it is after ``step`` steps."""
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1})
    set_rate(scheduler)


def set_lower_rate(scheduler: Any, after: int) -> None:
    """Let the learning rate be a tenth of the schedule's after step ``after``, which may be the step now reached."""

    def lowered(schedule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: schedule(step) * (LOWER if step >= after else 1.0)

    scheduler.lr_lambdas = [lowered(schedule) for schedule in scheduler.lr_lambdas]
    set_rate(scheduler)


def set_rate(scheduler: Any) -> None:
    """Give the optimiser the learning rate of the step that the schedule is at."""
    groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, schedule in groups:
        group["lr"] = base * schedule(scheduler.last_epoch)
