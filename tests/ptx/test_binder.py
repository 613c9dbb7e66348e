"""Launches pass through Triton's own binder and cache key: what it compiles in, and how often it compiles."""

import itertools
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl

from irlfast import ops
from tests.helpers import divergence_cases, ops_cases, reward_cases
from tests.ptx.driver import gpu

DEVICES = itertools.count(1000)  # for each, Triton begins without a compiled kernel


@triton.jit(do_not_specialize=["free"])
def copy_kernel(source, target, n, step, free, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at * step, tl.load(source + at * step, mask=at < n, other=7.0) + free, mask=at < n)


def copy(source: torch.Tensor, n: int, step: int = 1, free: int = 0) -> torch.Tensor:
    target = torch.zeros_like(source)
    copy_kernel[(1,)](source, target, n, step, free, SIZE=16)
    return target


def kinds(*calls: dict) -> int:
    """How many kernels Triton compiles for these calls of ``copy``."""
    with gpu(80, device=next(DEVICES)) as session:
        for call in calls:
            copy(**call)
    return len(session.compiled)


def test_a_launch_runs_on_the_memory_of_cpu_tensors():
    source = torch.randn(20)
    with gpu(90) as session:
        target = copy(source[2:], n=13, free=2)
    assert torch.equal(target, torch.cat([source[2:15] + 2, torch.zeros(5)]))
    assert [(launch.kernel, launch.grid) for launch in session.launches] == [("copy_kernel", (1, 1, 1))]


def test_triton_compiles_in_that_a_number_is_1_or_a_multiple_of_16_and_how_wide_it_is():
    source = torch.zeros(64)
    assert kinds({"source": source, "n": 2}, {"source": source, "n": 3}) == 1
    assert kinds({"source": source, "n": 1}, {"source": source, "n": 3}, {"source": source, "n": 16}) == 3
    assert kinds({"source": source, "n": 3}, {"source": source, "n": 2**31 + 1}) == 2


def test_triton_compiles_in_that_a_tensor_begins_at_a_multiple_of_16_bytes():
    source = torch.zeros(64)
    assert kinds(*({"source": source[first:], "n": 3} for first in (0, 4, 8))) == 1
    assert kinds(*({"source": source[first:], "n": 3} for first in (0, 1, 2))) == 2


def test_a_number_that_is_not_specialised_is_compiled_once():
    source = torch.zeros(64)
    assert kinds(*({"source": source, "n": 3, "free": free} for free in (1, 3, 16))) == 1


# ---------------------------------------------------------------- the project's kernels


SHIFTS = (0, 1)  # elements between the start of the memory and that of the targets


def targets_of(n: int, shift: int) -> torch.Tensor:
    return torch.arange(n + shift)[shift:] % 48


def log_ratio(n: int, shift: int) -> None:
    shared = {"vocabulary": 48, "size": 16, "dtype": torch.bfloat16, "rows": True, "bias": True}
    case = ops_cases.make([n], reference="hidden", **shared) | {"targets": targets_of(n, shift)}
    result = ops.log_ratio(**case, backend="triton")
    ops_cases.gradients(result.log_ratio.sum(), case)


def pair_loss(n: int, shift: int, **options: float) -> None:
    shared = {"vocabulary": 48, "size": 16, "dtype": torch.bfloat16, "rows": True, "bias": True}
    case = ops_cases.make([n - n // 2, n // 2], **shared) | {"targets": targets_of(n, shift)}
    result = ops.pair_loss(**case, beta=0.1, backend="triton", **options)
    ops_cases.gradients(result.loss, case)


def skipping_pair_loss(n: int, shift: int) -> None:
    pair_loss(n, shift, skip_mass=1e-6)


def token_divergence(n: int, shift: int) -> None:
    case = divergence_cases.make(vocabulary=48, dtype=torch.bfloat16, rows="both")
    case["rows"] = targets_of(n, shift) % 6
    ops_cases.gradients(ops.token_divergence(**case, backend="triton").sum(), case)


def logits_log_ratio(n: int, shift: int) -> None:
    logits = torch.randn(n, 48, requires_grad=True)
    for sequences in {1, n}:
        cu_seqlens = ops_cases.sequences([n] + [0] * (sequences - 1))
        inputs = logits, targets_of(n, shift), cu_seqlens
        result = ops.logits_log_ratio(*inputs, ref_logits=logits.detach(), backend="triton")
        result.log_ratio.sum().backward()


def reward_of_tokens(n: int, shift: int) -> None:
    reward_head([n - n // 2, n // 2], shift, pooling="token")


def reward_of_sequences(n: int, shift: int) -> None:
    reward_head([1] * n, shift, pooling="last")


def reward_head(lengths: list[int], shift: int, pooling: str) -> None:
    case = reward_cases.make(lengths, size=16, dtype=torch.bfloat16)
    case["rows"] = torch.zeros(shift + sum(lengths), dtype=torch.long)[shift:]
    ops.reward_head(**case, pooling=pooling, backend="triton").sum().backward()


def discriminator_loss(n: int, shift: int) -> None:
    lengths = [1] * n
    case = reward_cases.make(lengths, size=16, dtype=torch.bfloat16)
    labels = torch.cat([torch.zeros(shift, dtype=torch.long), reward_cases.labels_of(lengths)])[shift:]
    ops.discriminator_loss(**case, labels=labels, kind="gail", backend="triton").loss.backward()


def pairs_loss(n: int, shift: int) -> None:
    case = reward_cases.make([1, 1], size=16, dtype=torch.bfloat16)
    pairs = torch.tensor([[0, 1]]).expand(n + shift, 2).contiguous()[shift:]
    ops.discriminator_loss(**case, labels=None, pairs=pairs, kind="bradley_terry", backend="triton").loss.backward()


@pytest.mark.parametrize(
    "operation",
    [
        log_ratio,
        pair_loss,
        skipping_pair_loss,
        token_divergence,
        logits_log_ratio,
        reward_of_tokens,
        reward_of_sequences,
        discriminator_loss,
        pairs_loss,
    ],
)
def test_each_kernel_compiles_once_whatever_the_number_of_tokens_and_their_place(operation, on_gpu):
    """A second compilation would hold up a random step of a run for seconds."""
    with on_gpu(80, device=next(DEVICES)) as session:
        for n, shift in [(1, 0), (7, 0), (16, 1), (17, 0), (30, 1)]:  # also 16 items of pairs, and 16 hidden rows
            operation(n, shift)
    assert session.compiled
    repeated = {name: count for name, count in Counter(session.compiled).items() if count > 1}
    assert not repeated
