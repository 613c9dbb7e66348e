"""Print how long each kernel of a step of the pair loss runs on a GPU, and for how long the GPU waits in between.

    python -m benchmarks.timeline

The steps are those of the cases 4096x32000 and 4096x128256 of test_pair_loss.py. The script writes
``benchmarks/results/DATE-timeline.json``. With ``--quick`` it checks itself by a small step on any machine; a CPU's
operations call each other, so that their times do not add up.
"""

import itertools
import statistics
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.conftest import write_result
from benchmarks.measure import Case

STEPS = 3  # under the profiler
SHOWN = 12  # kernels, the longest first


def timeline(case: Case) -> dict[str, Any]:
    """Return the milliseconds per step: of the step by itself, of its kernels, and between them under the profiler."""
    inputs = measure.make_inputs(case)
    step = measure.step_of("irlfast", inputs, torch.zeros_like(inputs.targets, dtype=torch.float32))

    def whole() -> None:
        measure.drop_gradients(inputs)
        step()

    milliseconds = 1000 * statistics.median(measure.seconds_of(whole) for _ in range(9))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(STEPS):
            whole()
    events = [each for each in profiler.events() if each.device_type.name.lower() == measure.DEVICE.type]
    spans = sorted((each.time_range.start, each.time_range.end) for each in events)
    gaps = [max(0.0, later[0] - sooner[1]) for sooner, later in itertools.pairwise(spans)]
    kernels: dict[str, float] = {}
    for each in events:
        kernels[each.name] = kernels.get(each.name, 0.0) + each.time_range.elapsed_us() / 1000 / STEPS
    in_order = dict(sorted(kernels.items(), key=lambda item: -item[1]))
    return {"step": milliseconds, "kernels": in_order, "gaps": sum(gaps) / 1000 / STEPS}


def main() -> None:
    hidden, tokens, vocabularies = (64, 16, (1000,)) if "--quick" in sys.argv else (4096, 256, (32000, 128256))
    result = {}
    for vocabulary in vocabularies:
        found = timeline(Case("timeline", ("irlfast",), 16, tokens, hidden, vocabulary, "bfloat16"))
        print(f"V {vocabulary}: a step {found['step']:.2f} ms, its kernels {sum(found['kernels'].values()):.2f} ms")
        print(*(f"  {value:8.3f} ms {name[:100]}" for name, value in [*found["kernels"].items()][:SHOWN]), sep="\n")
        print(f"  {found['gaps']:8.3f} ms between kernels, under the profiler")
        result[str(vocabulary)] = found
    print(write_result("timeline", {"milliseconds": result}))


if __name__ == "__main__":
    main()
