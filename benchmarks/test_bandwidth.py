"""Compare memory-bound operations with a copy: ``pytest benchmarks/test_bandwidth.py [--quick]``.

The bytes of an operation are those that must be read or written once. The goal on a GPU is a share of the bandwidth of
a copy of the same size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.conftest import goal_lines, interleaved, write_result
from irlfast import native, ops
from irlfast.optim import FusedRMSprop

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"

# Steps to time, the bytes that each step moves, and checks before them: measured, expected, relative and absolute
# tolerance.
Steps = tuple[dict[str, Callable[[], object]], dict[str, int], list[tuple[Any, Any, float, float]]]


def logits_steps(n: int, vocabulary: int) -> Steps:
    dtype = torch.bfloat16 if GPU else torch.float32
    logits = torch.randn(n, vocabulary, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (n,), device=DEVICE)
    upstream = torch.ones(n, device=DEVICE)
    source, copy = logits.detach().clone(), torch.empty_like(logits)  # both() overwrites the logits

    def forward(backend: str) -> None:
        with torch.no_grad():
            ops.token_logps(source, targets, backend=backend)

    def both(backend: str) -> None:
        ops.token_logps(logits, targets, inplace_backward=True, backend=backend).backward(upstream)
        logits.grad = None

    size = logits.numel() * logits.element_size()
    steps: dict[str, Callable[[], object]] = {"copy": lambda: copy.copy_(source)}
    moved, checks = {"copy": 2 * size}, []
    for backend in ("auto", "cuda") if GPU and native.cuda else ("auto",):
        some = source[:64], targets[:64]
        measured, plain = (ops.token_logps(*some, backend=name) for name in (backend, "plain"))
        checks.append((measured, plain, 1e-5, 1e-4))
        suffix = "" if backend == "auto" else f", {backend}"
        steps |= {f"token_logps{suffix}": partial(forward, backend)}
        steps |= {f"token_logps, in-place backward{suffix}": partial(both, backend)}
        moved |= {f"token_logps{suffix}": size, f"token_logps, in-place backward{suffix}": 3 * size}
    return steps, moved, checks


def rmsprop_steps(tensors: int, size: int) -> Steps:
    ours = "FusedRMSprop" if native.cuda or not GPU else "FusedRMSprop, by torch"
    kinds = {ours: FusedRMSprop, "torch, foreach": partial(torch.optim.RMSprop, foreach=True)}
    lists = [[torch.ones(size, device=DEVICE, requires_grad=True) for _ in range(tensors)] for _ in kinds]
    for parameters in lists:
        for parameter in parameters:
            parameter.grad = torch.linspace(-1, 1, size, device=DEVICE)
    steps = {name: kind(own, lr=1e-3).step for (name, kind), own in zip(kinds.items(), lists, strict=True)}
    for step in steps.values():
        step()
    checks = [(lists[0], lists[1], 1e-6, 1e-6)]
    source = torch.randn(tensors * size, device=DEVICE)
    copy, moved = torch.empty_like(source), 4 * source.numel()
    # Parameter, gradient and square average are read; parameter and square average are written.
    return steps | {"copy": lambda: copy.copy_(source)}, {"copy": 2 * moved} | dict.fromkeys(steps, 5 * moved), checks


def reward_steps(rows: int, hidden: int, heads: int) -> Steps:
    dtype = torch.bfloat16 if GPU else torch.float32
    states = torch.randn(rows, hidden, device=DEVICE, dtype=dtype)
    head = torch.randn(heads, hidden, device=DEVICE, dtype=dtype)
    cu_seqlens = torch.arange(0, rows + 1, rows // 8, dtype=torch.int32, device=DEVICE)
    copy = torch.empty_like(states)
    size = states.numel() * states.element_size()

    measured, plain = (ops.reward_head(states, head, cu_seqlens, backend=name) for name in ("auto", "plain"))

    def forward() -> None:
        with torch.no_grad():
            ops.reward_head(states, head, cu_seqlens, pooling="token")

    steps = {"copy": lambda: copy.copy_(states), "reward_head": forward}
    return steps, {"copy": 2 * size, "reward_head": size}, [(measured, plain, 1e-3, 1e-3)]


# Shares of a copy's bandwidth.
GOALS = {"token_logps": 0.9, "token_logps, in-place backward": 0.9, "reward_head": 0.85}
GOALS |= {"token_logps, cuda": 0.92, "token_logps, in-place backward, cuda": 0.92, "FusedRMSprop": 0.9}
STEPS = {"logits": logits_steps, "rewards": reward_steps, "rmsprop": rmsprop_steps}
SHAPES = {
    "logits": {"quick": (8, 1000), "cpu": (256, 32000), "cuda": (8192, 128256)},
    "rmsprop": {"quick": (3, 1000), "cpu": (100, 500_000), "cuda": (100, 10_000_000)},
    "rewards": {"quick": (64, 64, 8), "cpu": (4096, 1024, 8), "cuda": (65536, 4096, 8)},
}


@pytest.mark.parametrize("case", STEPS)
def test_bandwidth(case, pytestconfig):
    quick = pytestconfig.getoption("quick")
    shape = SHAPES[case]["quick" if quick else DEVICE.type]
    steps, moved, checks = STEPS[case](*shape)
    for measured, expected, rtol, atol in checks:
        torch.testing.assert_close(measured, expected, rtol=rtol, atol=atol)
    seconds = interleaved(steps)
    gigabytes = {name: 1e-9 * moved[name] / seconds[name] for name in seconds}
    shares = {name: rate / gigabytes["copy"] for name, rate in gigabytes.items()}
    goals = [
        {"what": f"{name} / copy", "measured": shares[name], "limit": GOALS[name], "met": shares[name] >= GOALS[name]}
        for name in shares
        if GPU and name in GOALS
    ]
    for name, rate in gigabytes.items():
        print(f"{name}: {1000 * seconds[name]:.3g} ms, {rate:.3g} GB/s, {shares[name]:.0%} of a copy")
    if goals:
        print(*goal_lines(goals), sep="\n")
    if quick:
        return
    result = {"shape": shape, "seconds": seconds, "gigabytes_per_second": gigabytes, "goals": goals}
    write_result(f"bandwidth-{case}-{DEVICE.type}", result)
