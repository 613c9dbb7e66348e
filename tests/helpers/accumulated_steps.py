"""Started by test_zero.py: the gradient's norm in bfloat16 over many micro-batches, under each ZeRO stage.

The argument is a folder. Prints JSON: for each stage, the norm over 300 micro-batches of one row each in bfloat16, and
over one large batch of them in float32. All rows are equal: a sum in bfloat16 no longer grows after 256 of them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from irlfast.common import dist
from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.meters import Stopwatch
from irlfast.engine.plan import Plan
from irlfast.engine.step import prepare_step, train_step
from irlfast.losses.sft import sft_loss
from tests.helpers.results import print_results
from tests.helpers.small_llama import start_with_llama

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = 300
GROUPS = [PromptGroup([1, 3], ([4, 2],))] * ROWS


def norm(folder: Path, stage: int, dtype: str, tokens: int) -> float:
    """The norm of the gradient of one step whose micro-batches have at most so many tokens."""
    own = folder / f"{dist.rank()}.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    keys = {"dataset_name": ".", "model_name_or_path": str(folder), "dtype": dtype, "deepspeed": str(own)}
    plan = Plan(None, [np.arange(ROWS)], 1e-2, "rmsprop")
    engine = make_engine(folder / "model", sft_loss, plan, make_config(keys), GROUPS)
    prepared = prepare_step(plan.steps[0], GROUPS, engine.module.prepared.layout, tokens)
    taken = train_step(engine, prepared, 1.0, Stopwatch())
    engine.destroy()
    return taken.grad_norm


def main() -> None:
    folder = Path(sys.argv[1])
    start_with_llama(folder, torch.bfloat16, vocab_size=8, **SHAPE)
    norms = {
        f"ZeRO {stage}": [norm(folder, stage, "bfloat16", 4), norm(folder, stage, "float32", 10**6)]
        for stage in (1, 2, 3)
    }
    print_results(norms)


if __name__ == "__main__":
    main()
