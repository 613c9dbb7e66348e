"""Started by tests: ``irlfast train``, whose last process runs out of memory in batches of more than MOST tokens.

python -m tests.helpers.short_of_memory MOST [key=value]...
"""

import sys
from typing import Any

import torch

from irlfast.common import dist
from irlfast.engine import fit
from irlfast.engine.step import PreparedStep
from irlfast.train import main

train_step = fit.train_step


def step_with(most: int) -> Any:
    def step(engine: Any, prepared: PreparedStep, *others: Any) -> Any:
        largest = max(batch.input_ids.numel() for batch in prepared.batches)
        if dist.rank() == dist.world_size() - 1 and largest > most:
            raise torch.OutOfMemoryError("too much")
        return train_step(engine, prepared, *others)

    return step


if __name__ == "__main__":
    fit.train_step = step_with(int(sys.argv.pop(1)))
    sys.exit(main())
