"""Started by test_resized.py: steps of a tiny model from the checkpoint that any number of processes has left.

    python -m tests.helpers.resized_steps FOLDER FIRST LAST CASE...

A case is the ZeRO stage, the dtype, the optimiser, ``full``, ``lora`` or ``offload`` (all weights, and the optimiser
in host memory), and ``policy`` or ``reward``, with spaces between. The steps after ``FIRST`` up to ``LAST`` are taken,
and leave a checkpoint in the case's folder. Prints JSON: for every case the loss of each step, over all processes, and
the learning rate after it; and whether the checkpoint that was resumed is now in the engine and in the model's weights.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irlfast.common import dist
from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.checkpoint import resume, save_checkpoint, unlogged
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.fit import means
from irlfast.engine.memory import TokenLimit
from irlfast.engine.meters import Stopwatch
from irlfast.engine.plan import Plan
from irlfast.engine.state import STEP, WEIGHTS, fill, save_files, saved_spans, state_files
from irlfast.engine.step import add, prepare_steps, train_step
from irlfast.losses.sft import sft_loss
from irlfast.methods.reward import loss_of, recipe
from tests.helpers.results import print_results
from tests.helpers.small_llama import start_with_llama

STEPS, BATCH = 9, 8
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True}
SHAPE = {"hidden_size": 16, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPS = [PromptGroup([1, word], ([word, 4, 5, 2], [6, word, 2]), row=word) for word in range(3, 3 + STEPS * BATCH)]


def trained(folder: Path, case: str, first: int, last: int) -> dict[str, Any]:
    """Take the steps after ``first`` up to ``last``. Return their losses and rates, and the mean loss of all steps."""
    stage, dtype, optim, weights, kind = case.split()
    keys = {"dataset_name": ".", "model_name_or_path": str(folder), "zero_stage": int(stage), "dtype": dtype}
    keys |= {"weight_decay": 0.1, "warmup_ratio": 0.3, "max_tokens_per_batch": 64}
    if weights == "lora":
        keys |= {"use_peft": True, "lora_r": 3}
    elif weights == "offload":
        own = folder / f"{dist.rank()}.json"
        own.write_text(json.dumps({"zero_optimization": {"stage": int(stage), **OFFLOAD}}))
        keys["deepspeed"] = str(own)
    config = make_config(keys)
    steps = [np.arange(BATCH) + BATCH * step for step in range(STEPS)]
    reward = recipe(config) if kind == "reward" else None
    plan = Plan(0, steps, 1e-3, optim, reward)
    engine = make_engine(folder / "model", loss_of(config) if reward else sft_loss, plan, config, GROUPS)
    checkpoint = folder / case.replace(" ", "-") / "checkpoint"
    assert resume(engine, checkpoint, plan)["step"] == first
    same = first == 0 or is_loaded(engine, checkpoint / f"step-{first}", folder / "again" / case.replace(" ", "-"))
    sums, rows = unlogged(checkpoint, first), []
    layout = engine.module.prepared.layout
    for prepared in prepare_steps(plan.steps[first:last], GROUPS, layout, TokenLimit(64, auto=False)):
        taken = train_step(engine, prepared, 1.0, Stopwatch())
        sums = add(sums, taken.metrics)
        rows.append([means(taken.metrics)["loss"], engine.get_lr()[0]])
    save_checkpoint(engine, checkpoint, {"step": last}, sums, plan)
    engine.destroy()
    return {"steps": rows, "mean": means(sums)["loss"], "same": same}


def is_loaded(engine: Any, checkpoint: Path, again: Path) -> bool:
    """Return whether the engine, saved ``again``, and its model have the checkpoint's values bit by bit."""
    import deepspeed

    again.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    save_files(state_files(engine), again)
    dist.barrier()
    saved = whole_state(checkpoint)
    with deepspeed.zero.GatheredParameters(
        [*engine.module.parameters()], enabled=engine.zero_optimization_stage() == 3
    ):
        named = [(name, each) for name, each in engine.module.model.named_parameters() if each.requires_grad]
        own = all(torch.equal(each.flatten(), saved[name, WEIGHTS].to(each.dtype)) for name, each in named)
    there = whole_state(again)
    same = saved.keys() == there.keys() and all(torch.equal(saved[key], there[key]) for key in saved)
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(again)
    return all(dist.all_gather_object(own and same))


def whole_state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Return the values in the files of a checkpoint by parameter and kind, each kind of a parameter as one tensor."""
    with contextlib.ExitStack() as opened:
        state = {}
        for name, kinds in saved_spans(folder, opened).items():
            for kind, spans in kinds.items():
                state[name, kind] = torch.full([max(span.first + span.length for span in spans)], torch.nan)
                fill(state[name, kind], 0, spans)
        return {key: values for key, values in state.items() if key[1] != STEP}


def main() -> None:
    folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    start_with_llama(folder, vocab_size=100, **SHAPE)
    print_results({case: trained(folder, case, first, last) for case in sys.argv[4:]})


if __name__ == "__main__":
    main()
