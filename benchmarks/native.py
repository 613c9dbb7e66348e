"""Compare the native CPU code with PyTorch's: ``python -m benchmarks.native``. It takes a minute and writes a result.

Four cases: RMSprop on 100 tensors of 500,000 fp32 elements; the softmax step of the pair slab on 256 rows of 32,000
logits; ``token_logps`` and its in-place backward on as many given logits, in fp32 and bf16; the three products of the
pair slab between these rows and a head of 512 columns. Runs take turns, and the median of each counts. The bytes of a
case are those that must be read or written once.
"""

import argparse
import os
from unittest import mock

import torch

from benchmarks.conftest import interleaved, write_result
from irlfast import native, ops
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss import cpu_slab
from irlfast.ops.pair_loss.slab import SlabKernels
from irlfast.optim import FusedRMSprop


def rmsprop(tensors: int, size: int) -> dict[str, float]:
    def optimiser(kind: type[torch.optim.Optimizer], **options: bool) -> torch.optim.Optimizer:
        parameters = [torch.randn(size).requires_grad_() for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.randn(size)
        return kind(parameters, lr=1e-3, **options)

    source = torch.randn(tensors * size)
    target = torch.empty_like(source)
    steps = {
        "irlfast": optimiser(FusedRMSprop).step,
        "torch foreach": optimiser(torch.optim.RMSprop, foreach=True).step,
        "torch, a tensor at a time": optimiser(torch.optim.RMSprop, foreach=False).step,
        "copy": lambda: target.copy_(source),
    }
    seconds = interleaved(steps)
    elements = tensors * size
    gigabytes = {"irlfast GB/s": 20e-9 * elements / seconds["irlfast"], "copy GB/s": 8e-9 * elements / seconds["copy"]}
    return seconds | gigabytes


def softmax(softcap: float | None, n: int, vocabulary: int) -> dict[str, float]:
    logits, targets = torch.randn(n, vocabulary) * 4, torch.randint(vocabulary, (n,))
    head = torch.empty(vocabulary, 1)
    scored = ScoredTokens(targets, None, targets, 1, 1.0, softcap, torch.float32, 64)
    z, copy = logits.clone(), torch.empty_like(logits)

    def by_torch() -> None:
        with mock.patch.object(native, "cpu", None):
            cpu_slab.softmax(z, targets, HeadInputs(head, head, None), scored)

    steps = {
        "irlfast": lambda: cpu_slab.native_softmax(z, targets, HeadInputs(head, head, None), scored),
        "refill": lambda: z.copy_(logits),
        "torch": by_torch,
        "refill again": lambda: z.copy_(logits),
        "copy": lambda: copy.copy_(logits),
    }
    seconds = interleaved(steps)
    moved = 8e-9 * n * vocabulary
    return {name: seconds[name] for name in ("irlfast", "torch", "copy")} | {
        "irlfast GB/s": moved / seconds["irlfast"],
        "copy GB/s": moved / seconds["copy"],
    }


def token_logps(dtype: torch.dtype, n: int, vocabulary: int) -> dict[str, float]:
    """Time forward and backward. Ours is in place: it reads the logits twice and writes them once."""
    plain, targets = (torch.randn(n, vocabulary) * 4).to(dtype), torch.randint(vocabulary, (n,))
    z, copy = plain.clone(), torch.empty_like(plain)

    def ours(module: object) -> None:
        with mock.patch.object(native, "cpu", module):
            logits = z.copy_(plain).requires_grad_()
            logps = ops.token_logps(logits, targets, inplace_backward=True, backend="cpu")
            torch.autograd.grad(logps.sum(), logits)
        z.requires_grad_(False)

    def by_torch() -> None:
        logits = z.copy_(plain).requires_grad_()
        torch.autograd.grad(logits.float().log_softmax(-1).gather(1, targets[:, None]).sum(), logits)
        z.requires_grad_(False)

    steps = {
        "irlfast": lambda: ours(native.cpu),
        "irlfast, by rows": lambda: ours(None),
        "torch": by_torch,
        "copy": lambda: copy.copy_(plain),
    }
    seconds = interleaved(steps)
    moved = z.element_size() * 1e-9 * n * vocabulary
    seconds |= {name: seconds[name] - seconds["copy"] for name in steps if name != "copy"}  # each begins with a copy
    return seconds | {"irlfast GB/s": 3 * moved / seconds["irlfast"], "copy GB/s": 2 * moved / seconds["copy"]}


def products(dtype: torch.dtype, n: int, vocabulary: int, size: int = 512) -> dict[str, float]:
    """Time logits, d hidden and d weight, with fp32 results except in torch's own products of bf16 tensors."""
    hidden, weight = torch.randn(n, size).to(dtype), torch.randn(vocabulary, size).to(dtype)
    z, total = torch.randn(n, vocabulary), torch.zeros(vocabulary, size)
    narrow, narrow_total = z.to(dtype), total.to(dtype)

    def all_three(kernels: SlabKernels) -> None:
        kernels.logits(hidden, weight, z)
        kernels.times_weight(z, weight)
        kernels.add_times_hidden(total, z, hidden.float(), False)

    def bare() -> None:
        torch.mm(hidden, weight.T, out=narrow)
        torch.mm(narrow, weight)
        narrow_total.addmm_(narrow.T, hidden)

    by_torch = cpu_slab.EXACT if dtype == torch.float32 else cpu_slab.NARROW
    steps = {"torch, fp32 results": lambda: all_three(by_torch), f"torch, {native.name(dtype)} results": bare}
    if hasattr(native.cpu, "multiply"):
        steps = {"irlfast": lambda: all_three(cpu_slab.NATIVE[dtype])} | steps
    seconds = interleaved(steps)
    return seconds | {f"{name} GFLOP/s": 6e-9 * n * vocabulary * size / seconds[name] for name in steps}


def main() -> None:
    if native.cpu is None:
        raise SystemExit("irlfast._cpu is not built here: install a C++17 compiler, then irlfast again")
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="small tensors, to check that everything runs")
    quick = arguments.parse_args().quick
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that the result names the CPU as its device
    rows = (8, 1000) if quick else (256, 32000)
    cases = {"rmsprop": rmsprop(*(3, 1000) if quick else (100, 500_000))}
    cases |= {"softmax": softmax(None, *rows), "softmax, soft-cap 30": softmax(30.0, *rows)}
    for dtype in (torch.float32, torch.bfloat16):
        cases[f"token_logps, {native.name(dtype)}"] = token_logps(dtype, *rows)
    for dtype in (torch.float32, torch.bfloat16):
        cases[f"products, {native.name(dtype)}"] = products(dtype, *rows)
    for name, measured in cases.items():
        print(f"{name}:")
        for key, value in measured.items():
            print(
                f"  {key.ljust(34)} {value:8.1f}" if key.endswith("/s") else f"  {key.ljust(34)} {1000 * value:8.1f} ms"
            )
    print(f"written to {write_result('native-cpu', {'cases': cases})}")


if __name__ == "__main__":
    main()
