"""Measure how long training waits for a checkpoint, with ``async_save`` and without: ``python -m benchmarks.saving``.

Layers and torch's AdamW stand for a policy without ZeRO; the checkpoints are those of a run, and both ways take turns.
Each has some steps before it and some beside it. The script works on any device, and writes a result.
"""

import argparse
import statistics
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.conftest import write_result
from irlfast.common import dist
from irlfast.engine.checkpoint import save_checkpoint
from irlfast.engine.plan import Plan
from irlfast.engine.saving import finish, saving_beside

WIDTH = 1024
STEPS = 4  # before each checkpoint, and beside it
BATCH = 64  # rows
PLAN = Plan(None, [np.arange(BATCH)], 1e-4, "adamw_torch")


def engine_of(millions: float) -> Any:
    """Return what a checkpoint needs of an engine, around so many million parameters in float32."""
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(max(1, round(millions * 1e6 / WIDTH**2)))]
    model = torch.nn.Sequential(*layers).to(dist.device())
    module = types.SimpleNamespace(model=model, teacher=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return types.SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0)


def take_steps(engine: Any, count: int) -> float:
    """Take steps, and return the seconds of one."""
    begun = time.perf_counter()
    for _ in range(count):
        engine.module.model(torch.randn(BATCH, WIDTH, device=dist.device())).square().mean().backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    if dist.device().type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def one_checkpoint(engine: Any, folder: Path, step: int, beside: bool) -> dict[str, float]:
    """Write one checkpoint. Return the seconds that training waits, of steps before and beside it, and till its end."""
    before = take_steps(engine, STEPS)
    with saving_beside("benchmark", beside) as saving:
        begun, own = time.perf_counter(), time.thread_time()
        save_checkpoint(engine, folder, {"step": step}, {}, PLAN, saving)
        if dist.device().type == "cuda":
            torch.cuda.synchronize()
        row = {"waits": time.perf_counter() - begun, "waits_cpu": time.thread_time() - own, "step_before": before}
        row["step_beside"] = take_steps(engine, STEPS)
        finish(saving)
        return row | {"written": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=25, help="million parameters, of 12 bytes each [25]")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints of each way [5]")
    parser.add_argument("--quick", action="store_true", help="a small model, to check that the script runs")
    options = parser.parse_args()
    if options.quick:
        options.millions, options.repeats = 1, 1
    engine = engine_of(options.millions)
    rows: dict[str, list[dict[str, float]]] = {"async_save: false": [], "async_save: true": []}
    with tempfile.TemporaryDirectory(dir=".") as place:
        for number in range(2 * options.repeats):
            way = [*rows][number % 2]
            rows[way].append(one_checkpoint(engine, Path(place, "checkpoint"), number + 1, way.endswith("true")))
        size = sum(path.stat().st_size for path in Path(place).glob("checkpoint/step-*/*"))
    medians = {way: {name: statistics.median(row[name] for row in own) for name in own[0]} for way, own in rows.items()}
    for way, row in medians.items():
        print(f"{way}, {size / 1e6:,.0f} MB:", ", ".join(f"{name} {seconds:.3f} s" for name, seconds in row.items()))
    print(f"written to {write_result('saving', {'bytes': size, 'medians': medians, 'checkpoints': rows})}")


if __name__ == "__main__":
    main()
