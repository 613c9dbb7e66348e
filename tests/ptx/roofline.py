"""Count the bytes and operations of each Triton kernel from its PTX, and model its time.

``python -m tests.ptx.roofline`` writes the tables of ``docs/ptx.md``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from irlfast.kernels import divergence, exponentials, heavy_tiles, linear, logits, rewards, slab
from irlfast.ops.rewards.losses import Options
from tests.ptx.counts import Counts
from tests.ptx.driver import gpu

PAGE = Path(__file__).parents[2] / "docs" / "ptx.md"
START, END = "<!-- counts: python -m tests.ptx.roofline -->\n", "<!-- /counts -->"
BF16 = torch.bfloat16


class GPU(NamedTuple):
    """Peak rates per second, of NVIDIA's data sheets and white papers (SXM modules, without sparsity)."""

    name: str
    architecture: int
    bandwidth: float  # bytes
    tensor: float  # multiply-adds in bf16
    multiprocessors: int
    clock: float

    @property
    def issue(self) -> float:
        """Instructions of lanes: four warps per clock and multiprocessor."""
        return self.multiprocessors * 128 * self.clock

    @property
    def special(self) -> float:
        """Exponentials, logarithms and reciprocals of lanes."""
        return self.multiprocessors * 16 * self.clock


GPUS = [
    GPU("A100", 80, 2.039e12, 156e12, 108, 1.41e9),
    GPU("H100", 90, 3.35e12, 494.7e12, 132, 1.83e9),
    GPU("H200", 90, 4.8e12, 494.7e12, 132, 1.83e9),
]


class Case(NamedTuple):
    """A launch whose counts are given per element."""

    file: str  # of kernels/
    kernel: str
    element: str
    elements: int
    launch: Callable[[], object]
    own: tuple[str, ...] = ()  # arguments that have a number for each element, where others are read for many elements


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def targets(n: int) -> torch.Tensor:
    return torch.arange(n) * 7 % 256


N, V, H = 256, 512, 512  # of the products
ROWS = 4  # of the others


def logits_gradient() -> None:
    z, lse, upstream = random(ROWS, 8192), torch.full((ROWS,), 9.5), torch.ones(ROWS)
    logits.write_gradient(torch.empty_like(z), z, targets(ROWS), lse, upstream, 1.0, None)


def slab_softmax(slopes: bool) -> None:
    slab.softmax(random(ROWS, 32768, dtype=torch.float32), targets(ROWS), None, BF16, 1.0, None, slopes)


def divergence_of_rows() -> None:
    z, r = random(2, ROWS, 8192, dtype=torch.float32)
    divergence.divergence(z, None, 1.0, None, r, None, 1.0, None, (0.5, 0.5, 0.5), BF16)


def fused_logps() -> None:
    linear.token_logps([(random(N, H), random(V, H), None)], torch.arange(N), targets(N), 1.0, None)


def slab_of_exponentials() -> None:
    exponentials.exponentials(
        random(N, H), random(V, H) / 32, None, targets(N), torch.empty(N, V).to(BF16), 1.0, None, True
    )


def products_over_heavy_tiles() -> None:
    sums, logps, ones = torch.ones(V // 128, N), torch.zeros(N), torch.ones(N)
    heavy = heavy_tiles.heavy_tiles(sums, logps, targets(N), ones * 2.0**64, ones, 1.0, 0.0)
    heavy_tiles.times_weight(random(N, V), random(V, H), heavy)
    heavy_tiles.add_times_hidden(torch.empty(V, H), random(N, V), random(N, H), heavy, True)


def reward_heads() -> None:
    cu_seqlens = torch.tensor([0, N // 2, N], dtype=torch.int32)
    options = Options("gail", 0.5, 0.0, False, 20.0)
    labels = torch.tensor([True, False])
    rewards.forward(random(N, H), random(8, H), None, None, cu_seqlens, True, labels, None, options)


def reward_heads_backward() -> None:
    rewards.backward(random(N, H), random(8, H), random(N, 8, dtype=torch.float32), None, [True, True, True])


CASES = [
    Case(
        "logits",
        "token_logps_kernel",
        "logit",
        ROWS * 8192,
        lambda: logits.token_logps(random(ROWS, 8192), targets(ROWS), None, 1.0, None),
    ),
    Case("logits", "gradient_kernel", "logit", ROWS * 8192, logits_gradient),
    Case("slab", "softmax_kernel", "logit", ROWS * 32768, lambda: slab_softmax(True)),
    Case("divergence", "divergence_kernel", "pair of logits", ROWS * 8192, divergence_of_rows),
    Case("linear", "parts_kernel", "logit", N * V, fused_logps, own=("slab",)),
    Case("exponentials", "exponentials_kernel", "logit", N * V, slab_of_exponentials, own=("slab",)),
    Case("heavy_tiles", "times_weight_kernel", "logit", N * V, products_over_heavy_tiles, own=("slab",)),
    Case("heavy_tiles", "add_times_hidden_kernel", "logit", N * V, products_over_heavy_tiles, own=("slab",)),
    Case("rewards", "forward_kernel", "hidden number", N * H, reward_heads, own=("hidden",)),
    Case("rewards", "backward_kernel", "hidden number", N * H, reward_heads_backward, own=("hidden", "d_hidden")),
]


def counts_of(case: Case, architecture: int) -> Counts:
    """The counts of the case's launch of its kernel."""
    with mock.patch.object(linear, "capability", lambda _: divmod(architecture, 10)), gpu(architecture) as session:
        case.launch()
    [counts] = [launch.report.counts for launch in session.launches if launch.kernel == case.kernel]
    return counts


class PerElement(NamedTuple):
    """Counts divided by the number of elements."""

    read: float  # bytes that are read at least once: what any kernel must read
    read_again: float  # bytes
    written: float  # bytes
    instructions: float  # of lanes
    special: float  # of them exponentials, logarithms, reciprocals
    multiply_adds: float  # of tensor cores
    conflicts: float  # wavefronts of shared memory that bank conflicts add
    own: float  # bytes of the arguments that grow with the elements, each counted once


def per_element(case: Case, counts: Counts) -> PerElement:
    memory = counts.memory.values()
    own = [region for name, region in counts.memory.items() if not case.own or name in case.own]
    totals = (
        sum(region.distinct_loaded for region in memory),
        sum(region.reread for region in memory),
        sum(region.stored for region in memory),
        sum(counts.instructions.values()),
        counts.instructions.get("special", 0),
        counts.multiply_adds,
        counts.bank_conflicts,
        sum(region.distinct_loaded + region.distinct_stored for region in own),
    )
    return PerElement(*(total / case.elements for total in totals))


def model(gpu: GPU, counts: PerElement) -> tuple[float, str]:
    """Seconds per element if all that the kernel does overlaps, and what they are spent on.

    Of the memory's traffic, only the bytes that each element has for itself count: other bytes, such as a product's
    operands, are the fewer per element the larger the problem, and what is read again is taken for hits in the cache.
    """
    spent = {
        "memory": counts.own / gpu.bandwidth,
        "instructions": counts.instructions / gpu.issue,
        "exponentials": counts.special / gpu.special,
        "tensor cores": counts.multiply_adds / gpu.tensor,
    }
    bound = max(spent, key=spent.__getitem__)
    return spent[bound], bound


def tables() -> str:
    lines = []
    for architecture in (80, 90):
        own = [gpu for gpu in GPUS if gpu.architecture == architecture]
        names = "".join(f" {gpu.name}, *model* |" for gpu in own)
        lines += [
            f"### sm_{architecture}\n",
            f"| kernel | per | read | read again | written | instructions | multiply-adds | bank conflicts |{names}",
            "| --- | --- | --- | --- | --- | --- | --- | --- |" + " --- |" * len(own),
        ]
        for case in CASES:
            counts = per_element(case, counts_of(case, architecture))
            numbers = *counts[:4], *counts[5:7]
            shown = " | ".join(f"{number:,.4g}" for number in numbers)
            times = [model(gpu, counts) for gpu in own]
            shown += "".join(f" | {1e12 * seconds:.3g} ps, {bound}" for seconds, bound in times)
            lines.append(f"| `{case.file}.{case.kernel}` | {case.element} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + "\n" + tables() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
