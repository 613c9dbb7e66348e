"""Started by test_step.py: count the places of a training step where the host would wait for a GPU's values.

Prints JSON. For ZeRO stages 0 to 2: how often a step reads values at each place (``file:function``); how many
operations that wait ran in all, those included that C++ or indexing by a mask starts; and how many collectives.
"""

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.deepspeed_patches import timed_collectives
from irlfast.engine.memory import TokenLimit
from irlfast.engine.meters import Stopwatch
from irlfast.engine.plan import Plan
from irlfast.engine.process_group import destroy_process_group, init_process_group
from irlfast.engine.step import prepare_steps, train_step
from irlfast.losses.pairs import irft_loss
from irlfast.ops.common import checks
from irlfast.startup.prepare import quiet

METHODS = ("item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "tolist", "numpy", "cpu")
OPERATIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")  # the operations behind most of them
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS, BATCH = 3, 8


def recorded(method: Callable, places: Counter[str]) -> Callable:
    """Wrap a method of Tensor so that it counts its callers in ``places``."""

    @functools.wraps(method)
    def call(*given: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_code
        places[f"{Path(caller.co_filename).name}:{caller.co_name}"] += 1
        return method(*given, **options)

    return call


def main() -> None:
    quiet()
    init_process_group()
    folder = Path(sys.argv[1])
    LlamaForCausalLM(LlamaConfig(vocab_size=61, **SHAPE)).save_pretrained(folder / "model")
    checks.values_visible = lambda _: False  # as on a GPU, where values are not checked
    logps = (torch.zeros(5), torch.zeros(6))
    groups = [PromptGroup([1] * 9, ([2] * 5, [3] * 6), logps)] * BATCH
    print(json.dumps({stage: count(folder, groups, stage) for stage in (0, 1, 2)}))
    destroy_process_group()


def count(folder: Path, groups: list[PromptGroup], stage: int) -> dict[str, Any]:
    own = folder / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    keys = {"dataset_name": ".", "model_name_or_path": str(folder), "max_tokens_per_batch": 64}
    config = make_config(keys | ({"deepspeed": str(own), "zero_stage": stage} if stage else {}))
    steps = [np.arange(BATCH)] * STEPS
    loss = functools.partial(irft_loss, beta=0.1, loss_type="sigmoid", nll_weight=0.1)
    engine = make_engine(folder / "model", loss, Plan(0, steps, 1e-5, "rmsprop"), config, groups)
    watch, places = Stopwatch(), Counter[str]()
    *_, prepared = prepare_steps(
        steps, groups, engine.module.prepared.layout, TokenLimit(config.max_tokens_per_batch, auto=False)
    )
    train_step(engine, prepared, config.max_grad_norm, watch)
    methods = {name: getattr(torch.Tensor, name) for name in METHODS}
    try:
        for name, method in methods.items():
            setattr(torch.Tensor, name, recorded(method, places))
        with profile(activities=[ProfilerActivity.CPU]) as profiler, timed_collectives(watch):
            train_step(engine, prepared, config.max_grad_norm, watch)
    finally:
        for name, method in methods.items():
            setattr(torch.Tensor, name, method)
    operations = sum(event.count for event in profiler.key_averages() if event.key in OPERATIONS)
    collectives = sum(len(lap.collectives) for lap in watch.laps)
    return {"batches": len(prepared.batches), "places": places, "operations": operations, "collectives": collectives}


if __name__ == "__main__":
    main()
