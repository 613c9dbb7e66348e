"""One run of benchmarks/plans.py, in each of its processes: ``irlfast train``, measured.

    python -m benchmarks.planned {cpu,wall} KEY=VALUE...

With ``cpu``, the process has one thread on one core, and its clock counts CPU seconds; with ``wall``, the run is as
``irlfast train`` would have it. The last step is not timed: in it, the tensors that the process holds are counted.
Each process writes what it found to ``measured-RANK.json`` in the run's folder. The row of the last step is taken out
of metrics.jsonl.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import memory_of_process
from irlfast import train
from irlfast.common.logs import read_log, rewrite
from irlfast.engine import fit
from irlfast.engine.meters import Stopwatch
from irlfast.runs.metrics_log import is_logged

BUCKET = 4 * 500_000_000  # bytes of DeepSpeed's bucket, of which a CPU has memory only for the part that is written
STEPS = 6
ORIGINAL = fit.train_step
FOUND: dict[str, Any] = {"cpu": [], "wall": []}


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Return the bytes of the storages of tensors, by address."""
    held = [each for each in tensors if isinstance(each, Tensor)]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in held}


def live() -> dict[int, int]:
    """Return the storages of all tensors of this process, apart from those that its imports made."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.device.type == "cpu"]
    return storages([*tensors, *(each.grad for each in tensors if each.is_leaf)])


def parts(engine: Any) -> dict[str, int]:
    """Return the bytes of the weights, of the optimiser's state, and of all other tensors that are held."""
    parameters = [*engine.module.model.parameters()]
    weights = storages(getattr(each, "ds_tensor", each) for each in parameters)
    updated = [each for group in engine.basic_optimizer.param_groups for each in group["params"]]
    states = [value for state in engine.basic_optimizer.state.values() for value in state.values()]
    masters = [] if not engine.zero_optimization_stage() else updated
    masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    state = {place: size for place, size in storages([*states, *masters]).items() if place not in weights}
    held = live()
    others = {place: size for place, size in held.items() if place not in weights and place not in state}
    return {
        "weights": sum(weights.values()),
        "optimiser state": sum(state.values()),
        "gradients and gathered weights": sum(others.values()),
    }


def count_step(engine: Any, *given: Any) -> Any:
    """Take a step, and count what is held at its moments; the peak is the allocator's."""
    FOUND["held"] = {}
    step = engine.step

    def counted_step() -> None:
        FOUND["held"]["backward"] = parts(engine)
        step()

    updates: Any = engine.basic_optimizer
    hook = updates.register_step_post_hook(lambda *_: FOUND["held"].setdefault("update", parts(engine)))
    engine.step = counted_step
    before = sum(live().values())
    with torch.profiler.profile(profile_memory=True) as profiler:
        taken = ORIGINAL(engine, *given)
    hook.remove()
    engine.step = step
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    changes = [change for change in changes if abs(change) != BUCKET]
    most, held = 0, 0
    for change in changes:
        held += change
        most = max(most, held)
    FOUND["before"], FOUND["peak"] = before, before + most
    return taken


def measured_step(engine: Any, *given: Any) -> Any:
    FOUND["number"] = FOUND.get("number", 0) + 1
    if FOUND["number"] == STEPS:
        FOUND["most_resident"] = memory_of_process("VmHWM")
        return count_step(engine, *given)
    begun = time.process_time(), time.perf_counter()
    taken = ORIGINAL(engine, *given)
    FOUND["cpu"].append(time.process_time() - begun[0])
    FOUND["wall"].append(time.perf_counter() - begun[1])
    return taken


def make_engine(*given: Any, **keys: Any) -> Any:
    """Make the engine; the tensors that are there already are counted no more."""
    gc.collect()
    gc.freeze()
    return MAKE(*given, **keys)


MAKE = fit.make_engine


def main() -> int:
    output = Path(next(each for each in sys.argv if each.startswith("output_dir=")).partition("=")[2])
    if sys.argv.pop(1) == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("RANK", 0)) % len(cores)]})
        torch.set_num_threads(1)
        Stopwatch.now = lambda watch: time.process_time()  # type: ignore[method-assign]
    fit.train_step, fit.make_engine = measured_step, make_engine
    code = train.main()
    rank = int(os.environ.get("RANK", 0))
    (output / f"measured-{rank}.json").write_text(json.dumps(FOUND))
    if rank == 0 and code == 0:
        rows = read_log(output / "metrics.jsonl", is_logged)[0]
        rewrite(output / "metrics.jsonl", [row for row in rows if row["step"] < STEPS])
    return code


if __name__ == "__main__":
    sys.exit(main())
