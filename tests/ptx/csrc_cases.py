"""Each function of ``irlfast._cuda`` in the interpreter: its result, what it should be in fp64, and the reports."""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.ptx.csrc_module import Module, allocation, interpreted
from tests.ptx.machine import Report

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


class Outcome(NamedTuple):
    pairs: list[tuple[Tensor, Tensor, float]]  # a result, the one in fp64, and the tolerance relative to the largest
    reports: list[Report]

    @property
    def findings(self) -> list[str]:
        return [finding for report in self.reports for finding in report.findings]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rows_at(values: Tensor, offset: int, gap: int = 0) -> Tensor:
    """A copy whose memory begins ``offset`` elements after a multiple of 64 bytes, with a gap between rows."""
    n, width = values.shape
    memory = torch.full((n * (width + gap) + offset + 64,), float("nan"), dtype=values.dtype)
    start = -memory.data_ptr() % 64 // memory.itemsize + offset
    return memory[start : start + n * (width + gap)].view(n, width + gap)[:, :width].copy_(values)


def described(rows: Tensor | None) -> tuple[int, str, int]:
    return (0, "float32", 0) if rows is None else (rows.data_ptr(), NAMES[rows.dtype], rows.stride(0))


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def picked(final: Tensor, targets: Tensor) -> Tensor:
    logps = final.log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets < 0, 0.0, logps)


def epsilon(dtype: torch.dtype) -> float:
    return {torch.float32: 3e-6}.get(dtype, torch.finfo(dtype).eps)


def token_logps(
    module: Module,
    architecture: str,
    V: int,
    dtype: torch.dtype,
    ref: torch.dtype | None,
    cap: float | None,
    offset: int,
) -> Outcome:
    logits = rows_at((random(4, V) * 3).to(dtype), offset, gap=3)
    reference = None if ref is None else rows_at((random(4, V, seed=1) * 3).to(ref), offset // 2)
    targets = torch.tensor([V // 2, -100, 0, V - 1])
    logps, lse, ref_logps = (torch.full((4,), torch.nan) for _ in range(3))
    memory = allocation("logits", logits) + allocation("ref_logits", reference) + allocation("targets", targets)
    for name, out in (("logps", logps), ("lse", lse), ("ref_logps", ref_logps)):
        memory += allocation(name, out, fresh=True)
    scoring = (4, V, targets.data_ptr(), 0.7, cap or 0.0)
    with interpreted(module, architecture, memory) as reports:
        module.functions.token_logps(
            *(described(logits), described(reference), scoring),
            *(logps.data_ptr(), lse.data_ptr(), ref_logps.data_ptr(), 0),
        )
    final = capped(0.7 * logits.double(), cap)
    pairs = [(logps, picked(final, targets), 2e-6)]
    pairs.append((lse, torch.where(targets < 0, 0.0, final.logsumexp(1)), 2e-6))
    if reference is not None:
        pairs.append((ref_logps, picked(capped(0.7 * reference.double(), cap), targets), 2e-6))
    return Outcome(pairs, reports)


def write_gradient(
    module: Module, architecture: str, V: int, dtype: torch.dtype, cap: float | None, offset: int, written: str
) -> Outcome:
    """``written``: over the logits; apart, by vectors; or where vectors of logits and gradients do not meet."""
    logits = rows_at((random(4, V) * 3).to(dtype), offset, gap=0 if V % 8 == 0 else 8 - V % 8)
    starts, gap = {"apart": offset, "unaligned": offset + 1}, logits.stride(0) - V + 8
    grad = logits if written == "in place" else rows_at(torch.zeros_like(logits), starts[written], gap)
    targets, upstream = torch.tensor([V // 2, -100, 0, V - 1]), torch.tensor([1.5, 2.0, -0.5, 0.0])
    leaf = logits.double().requires_grad_()
    final = capped(0.7 * leaf, cap)
    lse = final.logsumexp(1).detach().float()
    (picked(final, targets) * upstream).sum().backward()
    memory = [
        *(allocation("logits", logits) + (allocation("grad", grad, fresh=True) if grad is not logits else [])),
        *(allocation("targets", targets) + allocation("lse", lse) + allocation("upstream", upstream)),
    ]
    scoring = (4, V, targets.data_ptr(), 0.7, cap or 0.0)
    with interpreted(module, architecture, memory) as reports:
        module.functions.write_gradient(
            described(grad), described(logits), scoring, lse.data_ptr(), upstream.data_ptr(), 0
        )
    return Outcome([(grad, leaf.grad, epsilon(dtype))], reports)


def softmax_slopes(
    module: Module,
    architecture: str,
    V: int,
    dtype: torch.dtype,
    cap: float | None,
    biased: bool,
    offset: int,
    slopes: bool = True,
) -> Outcome:
    z = rows_at(random(3, V) * 3, offset, gap=-V % 4)
    bias = random(V, seed=2) if biased else None
    leaf = (0.7 * (z.double() + (0 if bias is None else bias.double()))).requires_grad_()
    targets, logps = torch.tensor([V // 2, 0, V - 1]), torch.full((3,), torch.nan)
    expected = picked(capped(leaf, cap), targets)
    expected.sum().backward()
    memory = allocation("z", z) + allocation("bias", bias) + allocation("targets", targets)
    memory += allocation("logps", logps, fresh=True)
    scoring = (3, V, targets.data_ptr(), 0.7, cap or 0.0)
    with interpreted(module, architecture, memory) as reports:
        module.functions.softmax_slopes(
            *(described(z), NAMES[dtype], 0 if bias is None else bias.data_ptr(), scoring),
            *(logps.data_ptr(), slopes, 0),
        )
    pairs = [(logps, expected.detach(), 2e-6)]
    if slopes:
        pairs.append((torch.stack([row.view(dtype)[:V] for row in z]), leaf.grad, epsilon(dtype)))
    return Outcome(pairs, reports)


def sequence_sums(module: Module, architecture: str, reference: str, dtype: torch.dtype) -> Outcome:
    """``reference``: per token, per sequence, or none."""
    logps, targets = random(3000), torch.arange(3000) % 7
    targets[targets == 0] = -100
    cu_seqlens = torch.tensor([0, 5, 5, 2900, 3000], dtype=torch.int32)
    ref = {"none": None, "token": random(3000, seed=3), "sequence": random(4, seed=3)}[reference]
    ref, sums = None if ref is None else ref.to(dtype), torch.full((3, 4), torch.nan)
    memory = allocation("logps", logps) + allocation("targets", targets) + allocation("cu_seqlens", cu_seqlens)
    memory += allocation("ref_logps", ref) + allocation("sums", sums, fresh=True)
    with interpreted(module, architecture, memory) as reports:
        module.functions.sequence_sums(
            *(logps.data_ptr(), targets.data_ptr(), cu_seqlens.data_ptr(), 4),
            *(0 if ref is None else ref.data_ptr(), NAMES[dtype], reference == "token", sums.data_ptr(), 0),
        )
    policy = torch.stack([part.double().sum() for part in logps.tensor_split(cu_seqlens[1:-1].long())])
    theirs = torch.zeros(4, dtype=torch.float64)
    if reference == "sequence":
        theirs = ref.double()
    elif reference == "token":
        scored = torch.where(targets == -100, 0.0, ref.double())
        theirs = torch.stack([part.sum() for part in scored.tensor_split(cu_seqlens[1:-1].long())])
    return Outcome([(sums, torch.stack([policy - theirs, policy, theirs]), 1e-7)], reports)


def rmsprop(
    module: Module, architecture: str, centred: bool, momentum: bool, narrow: bool, copied: bool, offset: int
) -> Outcome:
    """One step of parameters that need several blocks, one block, a part of a vector, and one element."""
    rows, memory, pairs, kept = [], [], [], []
    for number, n in enumerate((9000, 37, 3, 1)):
        param, buffer = (rows_at(random(1, n, seed=seed), offset)[0] for seed in (0, 1))
        average = rows_at(random(1, n, seed=2) / 16, offset)[0]
        square = rows_at(random(1, n, seed=3).square() + 0.5, offset)[0]  # above average²: nothing cancels
        grad = rows_at(random(1, n, seed=4).to(torch.bfloat16 if narrow else torch.float32), offset)[0]
        copy = torch.zeros(n, dtype=torch.bfloat16)
        given = {"param": param, "grad": grad, "square": square, "average": average, "buffer": buffer, "copy": copy}
        given |= {
            name: None for name, used in (("average", centred), ("buffer", momentum), ("copy", copied)) if not used
        }
        kept.append(given)
        expected = stepped(*(x.double() for x in (param, square, average, buffer, grad)), centred, momentum)
        memory += [one for name, x in given.items() for one in allocation(f"{name}[{number}]", x)]
        rows.append((n, *(0 if x is None else x.data_ptr() for x in given.values()), narrow))
        for name, value in {**expected, "copy": expected["param"]}.items():
            if given[name] is not None:
                pairs.append((given[name], value, torch.finfo(torch.bfloat16).eps if name == "copy" else 1e-6))
    with interpreted(module, architecture, memory) as reports:
        module.functions.rmsprop(rows, 0.01, 0.99, 1e-8, 0.1, 0.9 if momentum else 0.0, 0.5, 0)
    return Outcome(pairs, reports)


def stepped(
    param: Tensor, square: Tensor, average: Tensor, buffer: Tensor, grad: Tensor, centred: bool, momentum: bool
) -> dict[str, Tensor]:
    grad = 0.5 * grad + 0.1 * param
    square = 0.99 * square + 0.01 * grad * grad
    average = average + 0.01 * (grad - average)
    step = grad / ((square - average * average if centred else square).sqrt() + 1e-8)
    buffer = 0.9 * buffer + step
    return {
        "param": param - 0.01 * (buffer if momentum else step),
        "square": square,
        "average": average,
        "buffer": buffer,
    }
