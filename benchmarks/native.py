"""The native CPU code against PyTorch's own: ``python -m benchmarks.native``, in a minute; writes benchmarks/results/.

RMSprop on 100 tensors of 500,000 fp32 elements; the softmax step of the pair slab on 256 rows of 32,000 logits; on as
many that exist already, ``token_logps`` and its backward in place, in fp32 and bf16. Runs are interleaved, and the
median of each counts; bytes are those that must be read and written once.
"""

import argparse
import os
from unittest import mock

import torch

from benchmarks.conftest import interleaved, write_result
from irlfast import native, ops
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss import cpu_slab
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
    found = interleaved(steps)
    elements = tensors * size
    gigabytes = {"irlfast GB/s": 20e-9 * elements / found["irlfast"], "copy GB/s": 8e-9 * elements / found["copy"]}
    return found | gigabytes


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
    found = interleaved(steps)
    moved = 8e-9 * n * vocabulary
    return {name: found[name] for name in ("irlfast", "torch", "copy")} | {
        "irlfast GB/s": moved / found["irlfast"],
        "copy GB/s": moved / found["copy"],
    }


def token_logps(dtype: torch.dtype, n: int, vocabulary: int) -> dict[str, float]:
    """Forward, and backward in place where it is ours: the logits are read twice and written once."""
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
    found = interleaved(steps)
    moved = z.element_size() * 1e-9 * n * vocabulary
    found |= {name: found[name] - found["copy"] for name in steps if name != "copy"}  # each began with one
    return found | {"irlfast GB/s": 3 * moved / found["irlfast"], "copy GB/s": 2 * moved / found["copy"]}


def main() -> None:
    if native.cpu is None:
        raise SystemExit("irlfast._cpu is not built here: install a C++17 compiler, then irlfast again")
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--quick", action="store_true", help="small tensors, to see that all of it runs")
    quick = known.parse_args().quick
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU's figures under the CPU's name
    rows = (8, 1000) if quick else (256, 32000)
    cases = {"rmsprop": rmsprop(*(3, 1000) if quick else (100, 500_000))}
    cases |= {"softmax": softmax(None, *rows), "softmax, soft-cap 30": softmax(30.0, *rows)}
    for dtype in (torch.float32, torch.bfloat16):
        cases[f"token_logps, {native.name(dtype)}"] = token_logps(dtype, *rows)
    for name, found in cases.items():
        print(f"{name}:")
        for key, value in found.items():
            print(f"  {key.ljust(26)} {value:8.1f}" if "GB/s" in key else f"  {key.ljust(26)} {1000 * value:8.1f} ms")
    print(f"written to {write_result('native-cpu', {'cases': cases})}")


if __name__ == "__main__":
    main()
