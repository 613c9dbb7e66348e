"""Started by tests: ``irlfast train`` in which some steps get a loss or a gradient that is not finite, or do not exist.

The first argument is JSON: ``{"how": ..., "phase": ..., "steps": [...], "ranks": [...]}``. Steps count from 1. ``how``:

- a name of ``FAULTS``: this happens to the loss of all micro-batches in these processes (default: in all);
- ``one group``: NaN is the loss of every micro-batch that has the first prompt group of one of the steps;
- ``absent``: the steps are taken out of the phase's plan.

With ``"until_lower": true``, all steps are good once the learning rate is lower. With ``"stop_at"``, the process gets
SIGTERM in this step until then.
"""

import itertools
import json
import math
import os
import signal
import sys
from typing import Any

from irlfast.common import dist
from irlfast.engine import fit, module
from irlfast.train import main
from tests.helpers.skipped_steps import FAULTS

FAULT = json.loads(sys.argv.pop(1))
train_phase, train_step, forward = fit.train_phase, fit.train_step, module.Policy.forward
now: dict[str, Any] = {"bad": False, "answers": []}


def phase(run: Any, folder: Any, policy: Any, groups: Any, loss: Any, plan: Any, teacher: Any) -> None:
    now["hit"] = folder.relative_to(run.output).as_posix() == FAULT["phase"]
    now["lower_rate"] = folder / "lower_rate.json"
    if now["hit"]:
        firsts = [groups[plan.steps[number - 1][0]] for number in FAULT["steps"]]
        now["answers"] = [(*group.answers[0],) for group in firsts]
        print("lines of the first groups:", [group.row + 1 for group in firsts], file=sys.stderr)
        if FAULT["how"] == "absent":
            plan = plan._replace(steps=[x for number, x in enumerate(plan.steps, 1) if number not in FAULT["steps"]])
    train_phase(run, folder, policy, groups, loss, plan, teacher)


def step(engine: Any, *others: Any) -> Any:
    over = FAULT.get("until_lower") and now["lower_rate"].exists()
    if now["hit"] and not over and engine.lr_scheduler.last_epoch + 1 == FAULT.get("stop_at"):
        os.kill(os.getpid(), signal.SIGTERM)
    now["bad"] = now["hit"] and not over and engine.lr_scheduler.last_epoch + 1 in FAULT["steps"]
    return train_step(engine, *others)


def poisoned(self: Any, batch: Any, normalisers: Any) -> Any:
    loss, metrics = forward(self, batch, normalisers)
    if not now["bad"] or dist.rank() not in FAULT.get("ranks", [0, 1]):
        return loss, metrics
    if FAULT["how"] == "one group":
        answers = [(*batch.targets[a:b].tolist(),) for a, b in itertools.pairwise(batch.cu_seqlens.tolist())]
        loss = loss * math.nan if set(answers) & {*now["answers"]} else loss
    return FAULTS.get(FAULT["how"], lambda loss: loss)(loss), metrics


if __name__ == "__main__":
    fit.train_phase, fit.train_step, module.Policy.forward = phase, step, poisoned
    sys.exit(main())
