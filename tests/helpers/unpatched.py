"""Started by test_deepspeed_patches.py: print, as JSON, how DeepSpeed behaves in each place without irlfast's patch."""

import gc
import json
import weakref
from typing import Any

import torch
from deepspeed.comm import comm
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.utils.groups import _clone_world_group

from irlfast.common import dist
from irlfast.engine.deepspeed_patches import coordinator_caches, release_zero3_engines, timed_collectives
from irlfast.engine.meters import Stopwatch
from irlfast.engine.process_group import destroy_process_group, init_process_group
from irlfast.startup.prepare import quiet


def make_engine(model: torch.nn.Module, stage: int, bf16: bool = False) -> Any:
    import deepspeed

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**31,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def finished_layer() -> weakref.ref:
    """A layer of an engine of ZeRO-3 that took two steps, after which it has its cache, and was destroyed."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)).to(dist.device())
    engine = make_engine(model, stage=3)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 8, device=dist.device())).sum())
        engine.step()
    engine.destroy()
    return weakref.ref(model[0])


def alive(layer: weakref.ref) -> bool:
    gc.collect()
    return layer() is not None


def held_layers() -> dict[str, bool]:
    layer = finished_layer()
    parameter_offload.FWD_MODULE_STACK.clear()
    by_cache = alive(layer)
    release_zero3_engines()
    released = not alive(layer)
    layer = finished_layer()
    for cache in coordinator_caches(partitioned_param_coordinator):
        cache.cache_clear()
    by_stack = alive(layer)
    release_zero3_engines()
    return {"held by the cache": by_cache, "held by the stack": by_stack, "released": released and not alive(layer)}


def float32_parameter() -> str:
    model = torch.nn.Sequential(torch.nn.Linear(8, 1, dtype=torch.bfloat16), torch.nn.LayerNorm(1)).to(dist.device())
    model[1].requires_grad_(False)
    make_engine(model, stage=1, bf16=True).destroy()
    return str(model[1].weight.dtype)


def collectives_of_one_process() -> int:
    engine, watch = make_engine(torch.nn.Linear(8, 1), stage=0), Stopwatch()
    with timed_collectives(watch):
        engine.backward(engine(torch.ones(1, 8, device=dist.device())).sum())
    engine.destroy()
    return len(watch.collectives)


def minutes_of_groups() -> list[float]:
    """The time limits of a group as DeepSpeed's own method makes it, and of DeepSpeed's clone of all processes."""
    groups = [type(comm.cdb).new_group(comm.cdb, [0]), _clone_world_group()]
    limits = [group._get_backend(dist.device()).options._timeout for group in groups]
    return [limit.total_seconds() / 60 for limit in limits]


def main() -> None:
    quiet()
    init_process_group(stall_timeout=3600)
    seen = {
        **held_layers(),
        "dtype of a float32 parameter": float32_parameter(),
        "collectives of one process": collectives_of_one_process(),
        "minutes of groups": minutes_of_groups(),
    }
    print(json.dumps(seen))
    destroy_process_group()


if __name__ == "__main__":
    main()
