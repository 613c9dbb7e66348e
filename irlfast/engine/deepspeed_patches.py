"""Every place where irlfast reaches into DeepSpeed's internals. All were seen on DeepSpeed 0.19.8.

Each function says what DeepSpeed does, and which upstream issue reports it. If a newer DeepSpeed no longer has the
place that a function patches, the function logs one line and does nothing, and training continues without the patch.
Only checkpoints need what they read, which is how ZeRO lays out the trained state (``held_spans``).
tests/engine/test_deepspeed_patches.py fails when DeepSpeed no longer needs a patch, or has moved its place.
"""

import contextlib
import datetime
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.common.messages import log_once
from irlfast.config import Config
from irlfast.config.deepspeed import zero_stage
from irlfast.engine.meters import Stopwatch
from irlfast.models.prepare import PreparedModel

# Up to 0.19.7, ZeRO-1 in bfloat16 ends with an AssertionError where a gradient is 0 or not finite.
TRIED = "0.19.8"
TRIED_WITH = f"irlfast was tested with {TRIED}"
COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor"),
)


def report_missing(place: str, effect: str) -> None:
    """Log once that DeepSpeed no longer has a ``place`` that is patched here, and what that changes."""
    import deepspeed

    log_once(f"warning: DeepSpeed {deepspeed.__version__} has no {place} ({TRIED_WITH}); {effect}")


def check_version() -> None:
    """Say in one line that a newer DeepSpeed than the one which was tried is installed.

    Raises:
        InputError: an older one is.
    """
    installed = importlib.metadata.version("deepspeed")
    if Version(installed) < Version(TRIED):
        raise InputError(f"DeepSpeed {installed} is too old: {TRIED_WITH}; pip install 'deepspeed>={TRIED}'")
    if Version(installed) > Version(TRIED):
        log_once(f"warning: DeepSpeed {installed} is newer than the one tried: {TRIED_WITH}")


def skip_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives for CPUs: 30 s at first use, a crash without g++.

    DeepSpeed compiles them if ``deepspeed.ops.__compatible_ops__`` has them, and offers no setting against it.
    It reads nothing else in this table, but would run a compiler for each start to fill it: that takes a second, hides
    what is printed meanwhile, and leaves a temporary folder after a kill. No upstream issue was found.
    """
    import deepspeed

    if hasattr(deepspeed.ops, "_probe_compatible_ops"):
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if compatible is None:
        report_missing("deepspeed.ops.__compatible_ops__", "it may compile collectives, which takes g++ and 30 s")
        return
    compatible["deepspeed_shm_comm"] = False


def give_timeout_to_groups(timeout: datetime.timedelta) -> None:
    """Give the groups that DeepSpeed makes later, such as its clone of all processes, the time limit of the first one.

    They would get torch's default: 30 minutes on a CPU, 10 on GPUs. No upstream issue was found.
    """
    from deepspeed.comm import comm

    backend: Any = getattr(comm, "cdb", None)
    if not hasattr(backend, "new_group"):
        report_missing("new_group in deepspeed.comm.comm.cdb", "a step of more than 10 minutes may end the run")
        return
    backend.new_group = functools.partial(torch.distributed.new_group, timeout=timeout)  # on the instance


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
    if kept and (zero_stage(config) == 3 or any(parameter.requires_grad for parameter in kept.values())):
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


def gather_unseen(engine: Any) -> None:
    """Let ZeRO-3 gather and free weights without the notes that ``gradient_checkpointing: selective`` takes of a layer.

    torch refuses an operation of the second forward pass of a layer that its first one did not have. But the first may
    find weights gathered that the second one has to gather, such as after a checkpoint was loaded. No upstream issue
    was found.
    """
    hooks = getattr(engine.optimizer, "parameter_offload", None)
    if hooks is None:  # not ZeRO-3
        return
    for name in [f"{when}_sub_module_{way}_function" for when in ("pre", "post") for way in ("forward", "backward")]:
        if not hasattr(hooks, name):
            report_missing(f"parameter_offload.{name}", "gradient_checkpointing selective may fail with zero_stage 3")
            continue
        setattr(hooks, name, without_modes(getattr(hooks, name)))


def without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose operations no dispatch mode of torch sees."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def keep_head_whole(engine: Any) -> None:
    """Let ZeRO-3 keep the head whole from its first use in a step to the step's update: one gather, by every process.

    ZeRO-3 would gather it for each micro-batch. It releases a parameter once no module is at work on it, and notes the
    numbers of those that are in ``ds_active_sub_modules``. A name there that is no module's keeps the parameter; the
    update empties the note and splits all parameters. DeepSpeed's own ``ds_persist`` would hold the head between steps,
    too, and would not hold it in the first step. No upstream issue was found.
    """
    if engine.zero_optimization_stage() < 3:
        return
    for parameter in engine.module.prepared.head_module.parameters(recurse=False):
        if not hasattr(parameter, "ds_active_sub_modules"):
            report_missing("ds_active_sub_modules of a parameter", "the head is gathered for each micro-batch")
            return
        parameter.ds_active_sub_modules.add("the step")


class Span(NamedTuple):
    """A run of a trained parameter's values, and where this process's optimiser has it."""

    name: str  # of the parameter
    first: int  # the place of the run's first value in the flattened parameter
    length: int
    weights: Tensor  # what the optimiser updates: the parameter, or a flat fp32 partition of many parameters
    offset: int  # where the run begins in the flattened ``weights``, and in each state of the optimiser

    def of(self, values: Tensor) -> Tensor:
        """Return the run's part of ``values``, which are the weights or a state of theirs."""
        return values.detach().view(-1)[self.offset : self.offset + self.length]


def held_spans(engine: Any) -> list[Span]:
    """Return the runs of trained parameters that this process's optimiser updates.

    Without ZeRO it updates every parameter whole. ZeRO 1 and 2 lay the parameters into one flat tensor, and cut that
    into equal partitions. ZeRO-3 cuts each parameter into equal parts.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    named = [(name, each) for name, each in engine.module.model.named_parameters() if each.requires_grad]
    if stage == 3:
        spans = [span_of_stage_3(optimizer, name, parameter) for name, parameter in named]
    elif stage:
        spans = [span for name, each in named for span in spans_in_partitions(optimizer, name, each)]
    else:
        spans = [Span(name, 0, each.numel(), each, 0) for name, each in named]
    return [span for span in spans if span.length > 0]


def span_of_stage_3(optimizer: Any, name: str, parameter: Any) -> Span:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    first = size * torch.distributed.get_rank(parameter.ds_process_group)
    length = min(size, parameter.ds_numel - first)
    return Span(name, first, length, optimizer.fp32_partitioned_groups_flat[group], offset)


def spans_in_partitions(optimizer: Any, name: str, parameter: Tensor) -> Iterator[Span]:
    """Yield the part of a parameter in this process's partition. Each parameter is a view of the flat tensor."""
    wholes = optimizer.bit16_groups_flat if hasattr(optimizer, "bit16_groups_flat") else optimizer.bf16_groups_flat
    for whole, group in zip(wholes, optimizer.param_groups, strict=True):
        [partition] = group["params"]
        place = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size()
        if 0 <= place < whole.numel():
            begin = partition.numel() * dist.rank()
            low, high = max(place, begin), min(place + parameter.numel(), begin + partition.numel())
            yield Span(name, low - place, high - low, partition, low - begin)


def give_weights_to_model(engine: Any) -> None:
    """Copy the weights that the optimiser has to the parameters, in all processes, as DeepSpeed does after a step."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()


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
