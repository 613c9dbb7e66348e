"""Every place where irlfast reaches into DeepSpeed's internals. All were seen on DeepSpeed 0.19.8.

Each function says what DeepSpeed does, and which upstream issue reports it. If a newer DeepSpeed no longer has the
place that a function patches, the function logs one line and does nothing, and training continues without the patch.
tests/engine/test_deepspeed_patches.py fails when DeepSpeed no longer needs a patch, or has moved its place.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.common.messages import log_once
from irlfast.config import Config
from irlfast.engine.meters import Stopwatch
from irlfast.models.prepare import PreparedModel

SEEN_ON = "0.19.8"
COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor"),
)


def report_missing(place: str, effect: str) -> None:
    """Log once that DeepSpeed no longer has a ``place`` that is patched here, and what that changes."""
    import deepspeed

    log_once(f"warning: DeepSpeed {deepspeed.__version__} has no {place} (irlfast was tested with {SEEN_ON}); {effect}")


def skip_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives for CPUs: 30 s at first use, a crash without g++.

    DeepSpeed compiles them if ``deepspeed.ops.__compatible_ops__`` has them, and offers no setting against it.
    No upstream issue was found.
    """
    import deepspeed

    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if compatible is None:
        report_missing("deepspeed.ops.__compatible_ops__", "it may compile collectives, which takes g++ and 30 s")
        return
    compatible["deepspeed_shm_comm"] = False


def release_zero3_engines() -> None:
    """Let go of the models of finished engines, which ZeRO-3 would hold until the process ends.

    Each engine appends its module to ``parameter_offload.FWD_MODULE_STACK`` and never removes it. A method of
    ``PartitionedParameterCoordinator`` caches its results by coordinator and module, without a limit. Both outlive
    ``engine.destroy()``. Upstream issue, open: https://github.com/deepspeedai/DeepSpeed/issues/7204
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    effect = "with zero_stage 3, the models of earlier phases may stay in memory"
    stack = getattr(parameter_offload, "FWD_MODULE_STACK", None)
    if stack is None:
        report_missing("parameter_offload.FWD_MODULE_STACK", effect)
    else:
        stack.clear()
    caches = coordinator_caches(partitioned_param_coordinator)
    if not caches:
        report_missing("cached method of PartitionedParameterCoordinator", effect)
    for cache in caches:
        cache.cache_clear()


def coordinator_caches(module: Any) -> list[Any]:
    """Return the ``functools.lru_cache`` objects of the coordinator's methods: another decorator's closure has them."""
    coordinator = getattr(module, "PartitionedParameterCoordinator", object)
    cells = [cell for method in vars(coordinator).values() for cell in getattr(method, "__closure__", None) or ()]
    return [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "cache_clear")]


def float32_parameters(prepared: PreparedModel, config: Config) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """Return the frozen parameters that a bfloat16 model keeps in float32, with their values, for ``keep_float32``.

    ``deepspeed.initialize`` rounds every parameter to bfloat16. Its setting ``keep_in_fp32_modules`` is for buffers
    only. Upstream issue, open: https://github.com/deepspeedai/DeepSpeed/issues/7747

    Raises:
        InputError: such a parameter is in training, or ZeRO-3 would split it.
    """
    if config.dtype == "float32":
        return []
    kept = {
        name: parameter for name, parameter in prepared.model.named_parameters() if parameter.dtype == torch.float32
    }
    if kept and (config.zero_stage == 3 or any(parameter.requires_grad for parameter in kept.values())):
        raise InputError(
            f"dtype: {type(prepared.base).__name__} keeps {next(iter(kept))} in float32 beside bfloat16, which "
            "DeepSpeed would round; expected dtype float32, or use_peft with a zero_stage below 3"
        )
    return [(parameter, parameter.data) for parameter in kept.values()]


def keep_float32(kept: list[tuple[torch.nn.Parameter, Tensor]]) -> None:
    """Give the parameters their float32 values back, after ``deepspeed.initialize`` rounded them."""
    for parameter, values in kept:
        parameter.data = values


def skip_reduction_of_one_process(engine: Any) -> None:
    """Spare a single process without ZeRO the reduction of its gradients, for which DeepSpeed would copy them all.

    No upstream issue was found.
    """
    if dist.world_size() > 1 or not isinstance(engine.optimizer, torch.optim.Optimizer):
        return
    if not hasattr(engine, "enable_backward_allreduce"):
        report_missing("engine.enable_backward_allreduce", "a step of one process copies its gradients")
        return
    engine.enable_backward_allreduce = False


@contextlib.contextmanager
def timed_collectives(watch: Stopwatch) -> Iterator[None]:
    """Within the context, record on ``watch`` when each of DeepSpeed's collectives begins and ends.

    The stopwatch takes their time from the part of the step that calls them: it is the time that the step waits.
    Collectives on another stream of a GPU run beside the backward pass, and ZeRO-3 waits for its own later: both stay
    in the part where they are. DeepSpeed's communication logger waits for the GPU at every collective, and gives sums
    for the whole run only. Upstream issue, open: https://github.com/deepspeedai/DeepSpeed/issues/7403
    """
    from deepspeed.comm import comm

    backend = getattr(comm, "cdb", None)
    present = [name for name in COLLECTIVES if hasattr(backend, name)]
    missing = [name for name in COLLECTIVES if name not in present]
    if missing:
        place = f"{', '.join(missing)} in deepspeed.comm.comm.cdb"
        report_missing(place, "time/communication in metrics.jsonl leaves them out")

    def timed(collective: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if dist.device().type == "cuda" and torch.cuda.current_stream() != torch.cuda.default_stream():
                return collective(*args, **kwargs)
            begin = watch.now()
            result = collective(*args, **kwargs)
            watch.collectives.append((begin, watch.now()))
            return result

        return call

    for name in present:  # on the instance, where they hide the methods of its class
        setattr(backend, name, timed(getattr(backend, name)))
    try:
        yield
    finally:
        for name in present:
            delattr(backend, name)
