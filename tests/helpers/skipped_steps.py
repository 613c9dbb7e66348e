"""Started by test_bad_steps.py: take steps under DeepSpeed, some of them with a loss or gradient that is not finite.

The arguments are a folder and a seed. Prints JSON. For every case: the steps that were skipped, and those that were
to be; whether the weights, the optimiser's state and all later steps are those of a training without the bad steps;
whether all processes have the same weights; and where the learning rate's schedule is before each step.
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irlfast.common import dist
from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.memory import TokenLimit
from irlfast.engine.meters import Stopwatch
from irlfast.engine.plan import Plan
from irlfast.engine.step import prepare_steps, train_step
from irlfast.losses.sft import sft_loss
from tests.helpers.results import print_results
from tests.helpers.small_llama import start_with_llama


class NanGradient(torch.autograd.Function):
    """The same value, with a gradient of NaN."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan


STEPS, BATCH = 7, 8
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAULTS = {  # of a loss
    "loss times 1000": lambda loss: loss * 1000,  # is no bad step
    "loss nan": lambda loss: loss * math.nan,
    "loss inf": lambda loss: loss + math.inf,
    "gradient nan": NanGradient.apply,
}
GROUPS = [PromptGroup([1, word], ([word, 4, 5, 2],), row=word) for word in range(3, 3 + STEPS * BATCH)]
CASES = [(0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")]


def state_of(engine: Any) -> list[torch.Tensor]:
    """Copies of this process's part of the weights, in all their copies, and of the optimiser's state."""
    optimizer = engine.optimizer
    basic = getattr(optimizer, "optimizer", optimizer)
    held = [parameter for group in basic.param_groups for parameter in group["params"]]
    held += [value for state in basic.state.values() for value in state.values() if torch.is_tensor(value)]
    held += [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    return [tensor.detach().clone() for tensor in held]


def trained(
    folder: Path, keys: dict[str, Any], optim: str, steps: list[int], bad: list[int], fault: Any
) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Take ``steps``; in the ``bad`` ones the last process's loss has a fault.

    Return the state, the steps that were skipped, and where the schedule was before each step.
    """
    now: dict[str, Any] = {}

    def loss(*arguments: Any, **options: Any) -> Any:
        value, metrics = sft_loss(*arguments, **options)
        hit = now["step"] in bad and dist.rank() == dist.world_size() - 1
        return (fault(value) if hit else value), metrics

    plan = Plan(None, [np.arange(BATCH) + BATCH * step for step in steps], 1e-2, optim)
    engine = make_engine(folder / "model", loss, plan, make_config(keys), GROUPS)
    skipped, places = [], []
    prepared_steps = prepare_steps(plan.steps, GROUPS, engine.module.prepared.layout, TokenLimit(24, auto=False))
    for step, prepared in zip(steps, prepared_steps, strict=True):
        now["step"] = step
        places.append(engine.lr_scheduler.last_epoch)
        before = state_of(engine)
        taken = train_step(engine, prepared, 1.0, Stopwatch())
        if not math.isfinite(taken.grad_norm):
            skipped.append(step)
            assert all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True)), "a skipped step moved"
    state = state_of(engine)
    engine.destroy()
    return state, skipped, places


def main() -> None:
    folder, draw = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    start_with_llama(folder, vocab_size=100, **SHAPE)
    results = {}
    for stage, dtype in CASES:
        name, fault = draw.choice([*FAULTS.items()][1:])
        bad = sorted(draw.sample(range(STEPS), draw.randint(1, STEPS - 1)))
        own = folder / f"{dist.rank()}.json"
        own.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        keys = {"dataset_name": ".", "model_name_or_path": str(folder), "zero_stage": stage, "dtype": dtype}
        keys |= {"weight_decay": 0.1, "warmup_ratio": 0, "lr_scheduler_type": "constant", "deepspeed": str(own)}
        optim = draw.choice(["adamw_torch", "rmsprop"])
        state, skipped, places = trained(folder, keys, optim, [*range(STEPS)], bad, fault)
        good = [step for step in range(STEPS) if step not in bad]
        expected, none, _ = trained(folder, keys, optim, good, [], fault)
        results[f"ZeRO {stage}, {dtype}, {optim}, {name}"] = {
            "bad": bad,
            "skipped": dist.all_gather_object(skipped),
            "none": none,
            "same": all(dist.all_gather_object(all(map(torch.equal, state, expected)))),
            "places": places,
        }
    print_results(results)


if __name__ == "__main__":
    main()
