"""The optimiser and the learning-rate schedule of a phase, both in their first state."""

from typing import Any

import torch
import transformers

from irlfast.config import Config
from irlfast.engine.plan import Plan
from irlfast.optim import FusedRMSprop

OPTIMIZERS = {"rmsprop": FusedRMSprop, "adamw_torch": torch.optim.AdamW}


def make_optimizer(model: torch.nn.Module, plan: Plan, config: Config) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OPTIMIZERS[plan.optim](parameters, lr=plan.learning_rate, weight_decay=config.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, plan: Plan, config: Config) -> Any:
    steps = len(plan.steps)
    return transformers.get_scheduler(
        config.lr_scheduler_type, optimizer, round(config.warmup_ratio * steps), num_training_steps=steps
    )
