"""The native CPU module: its softmax against fp64, its errors; its code under the sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from irlfast import native, ops
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.logits import cpu_rows
from irlfast.ops.pair_loss import cpu_slab
from tests.helpers.ops_cases import gradients, make
from tests.helpers.tiers import first_then_full

ROOT = Path(__file__).parents[2]
needs_module = pytest.mark.skipif(native.cpu is None, reason="irlfast._cpu is not built here")


def scored(targets: torch.Tensor, dtype: torch.dtype, scale: float = 1.0, softcap: float | None = None) -> ScoredTokens:
    return ScoredTokens(targets, None, targets, 1, scale, softcap, dtype, 64)


def both(z: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, **options: float | None) -> tuple:
    """Log-probabilities, v and slab, by the module in fp32 and by PyTorch in fp64."""
    head = torch.empty(z.shape[1], 1)
    ours = cpu_slab.native_softmax(
        z.clone(), targets, HeadInputs(head, head, bias), scored(targets, torch.float32, **options)
    )
    double = None if bias is None else bias.double()
    exact = cpu_slab.softmax(
        z.double(), targets, HeadInputs(head, head, double), scored(targets, torch.float64, **options)
    )
    return ours, exact


@needs_module
@pytest.mark.parametrize("largest", [1.0, 80.0])
@pytest.mark.parametrize("softcap", [None, 30.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("biased", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 32000])
def test_softmax_matches_fp64(vocabulary, biased, scale, softcap, largest):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(9, vocabulary + 5, generator=random)[:, :vocabulary] * largest / 4
    targets = torch.randint(vocabulary, (9,), generator=random)
    bias = None if biased is None else torch.randn(vocabulary, generator=random).to(biased)
    (logps, v, slab), (exact, exact_v, exact_slab) = both(z, targets, bias, scale=scale, softcap=softcap)
    torch.testing.assert_close(logps.double(), exact, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(v.double(), exact_v, rtol=1e-5, atol=0)
    # The slab times v is what products take: probabilities, so its errors count against 1.
    actual, expected = slab.double() * v.double()[:, None], exact_slab * exact_v[:, None]
    assert (actual - expected).abs().max() < 2e-6


@needs_module
def test_the_sum_of_many_small_values_is_not_lost():
    """Each value is below the last digit of a row's sum in fp32. Errors of one sign would add up over tokens."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(512, 32000, generator=random) * 4
    targets = torch.randint(32000, (512,), generator=random)
    (logps, *_), (exact, *_) = both(z, targets, None)
    assert (logps.double() - exact).mean().abs() < 2e-7
    actual = ops.token_logps(z, targets, backend="cpu")
    assert (actual.double() - exact).mean().abs() < 2e-7


@needs_module
def test_a_nan_row_leaves_other_rows_unchanged():
    z = torch.randn(4, 100)
    targets = torch.tensor([1, 2, 3, 4])
    (clean, _, clean_slab), _ = both(z, targets, None)
    for value in (float("nan"), float("inf")):
        broken = z.clone()
        broken[1, 50] = value
        (logps, _, slab), _ = both(broken, targets, None)
        assert logps[1].isnan() and slab[1].isnan().any()
        assert torch.equal(logps[[0, 2, 3]], clean[[0, 2, 3]]) and torch.equal(slab[[0, 2, 3]], clean_slab[[0, 2, 3]])
    impossible = z.clone()
    impossible[:, 50:] = -float("inf")
    (logps, _, slab), (exact, *_) = both(impossible, targets, None)
    torch.testing.assert_close(logps.double(), exact, rtol=1e-6, atol=1e-5)
    assert slab[:, 50:].eq(0).all()


@needs_module
@pytest.mark.parametrize("vocabulary", [1, 7, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", range(4))
def test_rows_of_logits_begin_anywhere_and_are_all_that_is_touched(vocabulary, dtype, offset):
    distance = vocabulary + offset
    memory = torch.full((offset + 4 * distance,), float("nan"), dtype=dtype)
    logits = memory[offset:].as_strided((3, vocabulary), (distance, 1))
    logits.copy_(torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(offset)) * 3)
    targets, upstream = torch.tensor([0, -100, vocabulary - 1]), torch.tensor([1.0, 1.0, -2.0])
    exact = torch.log_softmax(logits.double() * 0.5, 1)
    logps, lse = cpu_rows.native_token_logps(logits, targets, 0.5, None)
    expected = torch.stack([exact[0, 0], exact.new_zeros(()), exact[2, -1]])
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=2e-6)
    gradient = 0.5 * upstream[:, None] * (torch.nn.functional.one_hot(targets.clamp(min=0), vocabulary) - exact.exp())
    gradient[1] = 0
    cpu_rows.write_gradient(logits, logits, targets, lse, upstream, 0.5, None)
    torch.testing.assert_close(logits.double(), gradient, rtol=torch.finfo(dtype).eps, atol=1e-6)
    logits.fill_(float("nan"))
    assert memory.isnan().all()


@needs_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_threads_change_no_bit_of_logits(dtype, softcap):
    logits, targets = torch.randn(64, 3000).to(dtype), torch.randint(3000, (64,))
    targets[::3] = -100
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        logps, lse = cpu_rows.native_token_logps(logits, targets, 0.5, softcap)
        grad = torch.empty_like(logits)
        cpu_rows.write_gradient(grad, logits, targets, lse, torch.ones(64), 0.5, softcap)
        results.append((logps, lse, grad))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))


@needs_module
@pytest.mark.skipif(sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="no OpenMP to be found")
def test_the_threads_are_those_of_pytorchs_openmp():
    """Further threads would share the cores with PyTorch's. OpenMP keeps its threads alive, so they can be counted."""
    code = """
import os, torch
from irlfast.ops.logits import cpu_rows
logits, targets = torch.zeros(64, 3000), torch.zeros(64, dtype=torch.long)
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
cpu_rows.native_token_logps(logits, targets, 1.0, None)
print(len(os.listdir("/proc/self/task")) - before)
"""
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=one)
    assert done.stdout == "2\n"


@needs_module
def test_threads_change_no_bit():
    z, targets = torch.randn(64, 3000), torch.randint(3000, (64,))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(both(z, targets, None)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_module_pytorch_does_its_work(dtype, monkeypatch):
    case = make([5, 3, 0, 7], vocabulary=1000, dtype=dtype, bias=True, softcap=30.0, rows=True, reference="hidden")
    expected = ops.pair_loss(**case, beta=0.3)
    exact = gradients(expected.loss, case)
    monkeypatch.setattr(native, "cpu", None)
    actual = ops.pair_loss(**case, beta=0.3)
    torch.testing.assert_close(actual.log_ratio, expected.log_ratio, rtol=1e-5, atol=3e-5)
    for name, gradient in gradients(actual.loss, case).items():
        assert (gradient - exact[name]).abs().max() <= exact[name].abs().max() * (1e-4 if dtype.itemsize == 4 else 1e-2)


@needs_module
def test_the_binding_checks_what_it_is_given():
    z, targets, out = torch.zeros(2, 4), torch.tensor([0, 4]), torch.zeros(2)
    address, rest = z.data_ptr(), (targets.data_ptr(), 1.0, 0.0)
    for rows, of, message in (
        ((address, "float32", 4), (2, 4, *rest), "targets: found 4"),
        ((address, "float32", 3), (2, 4, *rest), "z: found rows 3 apart, expected at least V"),
        ((0, "float32", 4), (2, 4, *rest), "z: found a null pointer"),
        ((address + 2, "float32", 4), (2, 4, *rest), "z: found an address that is not aligned"),
        ((address, "bfloat16", 4), (2, 4, *rest), "z: found dtype bfloat16, expected float32"),
        ((address, "float32", 4), (2, 0, *rest), r"logits: found \[2, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            native.cpu.softmax_slopes(rows, 0, of, out.data_ptr(), out.data_ptr(), 1)


@needs_module
def test_the_binding_checks_the_logits_it_is_given():
    address = torch.zeros(64, dtype=torch.int64).data_ptr()
    scoring, narrow = (2, 4, address, 1.0, 0.0), (address, "bfloat16", 4)
    for logits, of, message in (
        ((0, "float32", 4), scoring, "logits: found a null pointer"),
        ((address + 1, "bfloat16", 4), scoring, "logits: found an address that is not aligned"),
        ((address, "float16", 4), scoring, "logits: found dtype float16, expected float32 or bfloat16"),
        ((address, "float32", 4), (2, 0, *scoring[2:]), r"logits: found \[2, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            native.cpu.token_logps(logits, of, address, address, 1)
    for grad, message in (
        ((address, "bfloat16", 3), "grad: found rows 3 apart, expected at least V"),
        ((address, "float32", 4), "grad: found another dtype than that of logits"),
    ):
        with pytest.raises(ValueError, match=message):
            native.cpu.write_gradient(grad, narrow, scoring, address, address, 1)


FLAGS = "-std=c++17 -O1 -g -Wall -Wextra -Werror -fno-sanitize-recover=all -fopenmp-simd -pthread".split()
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("product", "rmsprop", "softmax_slopes", "token_logps")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("sanitizers", first_then_full(["address,undefined", "thread"]))
def test_the_sanitizers_find_nothing(sanitizers, tmp_path):
    build = ["g++", *FLAGS, f"-fsanitize={sanitizers}", "-Icsrc/cpu", *SOURCES, "tests/csrc/sanitized.cpp"]
    subprocess.run([*build, "-o", tmp_path / "sanitized"], check=True, cwd=ROOT)
    done = subprocess.run([tmp_path / "sanitized"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "all sizes and forms\n", done.stdout + done.stderr
