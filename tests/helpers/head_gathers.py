"""Started by test_head.py in two processes: how often ZeRO-3 gathers the head, and what the steps come to.

The argument is a folder. Prints JSON: for each case, with the head kept whole in a step and without, the gathers of the
head in each step, the loss of each step in this process, and the trained weights after the last one.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast.common import dist
from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.checkpoint import gather_state
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.deepspeed_patches import release_zero3_engines
from irlfast.engine.meters import Stopwatch
from irlfast.engine.plan import Plan
from irlfast.engine.process_group import init_process_group
from irlfast.engine.step import prepare_step, train_step
from irlfast.losses.sft import sft_loss
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results

SHAPE = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 36, "num_hidden_layers": 2}
GROUPS = [PromptGroup([1, word], ([word, 4, 5, 2],)) for word in range(3, 27)]
KEYS = {"untied": {}, "tied": {}, "LoRA": {"use_peft": True, "lora_r": 3}}
MICRO = (1, 3, 1, 3)  # micro-batches of each step
TOKENS = {1: 64, 3: 6}  # of a micro-batch, by their number
LARGE = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def count_gathers(engine: Any) -> list[int]:
    """Return a list of one number, which grows with each gather of the head."""
    gathers, head = [0], engine.module.prepared.head_module._parameters["weight"]

    def counted(own: Any, gather: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            parameters = given[0] if given else options.get("param_list", [own])
            among = any(each is head for each in parameters)
            gathers[0] += among and head.ds_status == ZeroParamStatus.NOT_AVAILABLE
            return gather(*given, **options)

        return call

    for parameter in engine.module.parameters():
        parameter.all_gather_coalesced = counted(parameter, parameter.all_gather_coalesced)
        parameter.all_gather = counted(parameter, parameter.all_gather)
    return gathers


def steps(folder: Path, name: str) -> dict[str, Any]:
    keys = {"dataset_name": ".", "model_name_or_path": str(folder), "zero_stage": 3, **KEYS[name]}
    config = make_config(keys | {"deepspeed": str(folder / "deepspeed.json")})
    plan = Plan(0, [np.arange(6) + 6 * step for step in range(len(MICRO))], 1e-3, "rmsprop")
    engine = make_engine(folder / name, sft_loss, plan, config, GROUPS)
    gathers, counts, losses = count_gathers(engine), [], []
    for micro, chosen in zip(MICRO, plan.steps, strict=True):
        prepared = prepare_step(chosen, GROUPS, engine.module.prepared.layout, TOKENS[micro])
        assert len(prepared.batches) == micro
        before = gathers[0]
        losses.append(float(sum(train_step(engine, prepared, 1.0, Stopwatch()).losses)))
        counts.append(gathers[0] - before)
    state = gather_state(engine, trained_only=True)
    engine.destroy()
    release_zero3_engines()
    return {"gathers": counts, "losses": losses, "weights": {key: x.flatten().tolist() for key, x in state.items()}}


def main() -> None:
    quiet()
    init_process_group()
    folder = Path(sys.argv[1])
    if dist.is_main():
        (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 3, **LARGE}}))
        for name in KEYS:
            shape = LlamaConfig(**SHAPE, num_attention_heads=2, tie_word_embeddings=name == "tied")
            LlamaForCausalLM(shape).save_pretrained(folder / name)
    dist.barrier()
    results = {}
    for name in KEYS:
        kept = steps(folder, name)
        with mock.patch("irlfast.engine.step.keep_head_whole"):
            results[name] = {"kept": kept, "before": steps(folder, name)}
    print_results(results)


if __name__ == "__main__":
    main()
