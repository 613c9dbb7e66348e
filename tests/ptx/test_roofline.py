"""Kernels read and write each number as often as they promise. The page has the counts of today."""

import pytest
import torch

from irlfast.kernels import divergence, exponentials, logits, rewards, slab
from irlfast.ops.rewards.losses import Options
from tests.helpers.tiers import sweep
from tests.ptx import roofline
from tests.ptx.counts import Traffic
from tests.ptx.driver import ARCHITECTURES, gpu
from tests.ptx.roofline import random, targets

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = [37, 5000, 8208]  # also rows that take several iterations, and rows that no vector fits
ROWS = 3


def traffic(architecture, launch, *args) -> dict[str, Traffic]:
    """The traffic of each argument of a single launch."""
    with gpu(architecture) as session:
        launch(*args)
    [launched] = session.launches
    return launched.report.counts.memory


@sweep(vocabulary=SIZES, dtype=[BF16, FP32], architecture=ARCHITECTURES)
def test_log_probabilities_read_each_logit_once_and_the_targets_logit_again(vocabulary, dtype, architecture):
    z = random(ROWS, vocabulary, dtype=dtype)
    memory = traffic(architecture, logits.token_logps, z, targets(ROWS) % vocabulary, None, 1.0, None)
    read = memory["logits"]
    assert read.distinct_loaded == z.numel() * z.itemsize
    assert read.reread <= ROWS * 1024 * z.itemsize  # the target's logit, by each thread of its program
    assert sum(region.stored for region in memory.values()) == 2 * 4 * ROWS


@sweep(vocabulary=SIZES, dtype=[BF16, FP32], architecture=ARCHITECTURES)
def test_the_gradient_of_logits_reads_and_writes_each_of_them_once(vocabulary, dtype, architecture):
    z, ones = random(ROWS, vocabulary, dtype=dtype), torch.ones(ROWS)
    inputs = torch.empty_like(z), z, targets(ROWS) % vocabulary, ones, ones, 1.0, None
    memory = traffic(architecture, logits.write_gradient, *inputs)
    assert memory["logits"].loaded == memory["grad"].stored == z.numel() * z.itemsize


@sweep(vocabulary=[48, 5008, 32768], dtype=[BF16, FP32], architecture=ARCHITECTURES)
def test_the_slabs_softmax_reads_each_logit_twice_and_writes_each_derivative_once(vocabulary, dtype, architecture):
    for slopes in (True, False):
        z = random(ROWS, vocabulary, dtype=FP32)
        memory = traffic(architecture, slab.softmax, z, targets(ROWS) % vocabulary, None, dtype, 1.0, None, slopes)
        [region] = [region for name, region in memory.items() if "z" in name]
        passes = 2 if slopes else 1
        assert 0 <= region.loaded - passes * z.numel() * 4 <= ROWS * 1024 * 4  # the target's logit, by each thread
        assert region.stored == (z.numel() * dtype.itemsize if slopes else 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_divergence_reads_each_pair_of_logits_three_times_and_writes_each_derivative_once(architecture):
    z, r = random(2, ROWS, 4112, dtype=FP32).unbind()
    memory = traffic(architecture, divergence.divergence, z, None, 1.0, None, r, None, 1.0, None, (0.5, 0.5, 0.5), BF16)
    both = [region for name, region in memory.items() if {"z", "r", "slope"} & {*name.split("+")}]
    assert sum(region.loaded for region in both) == 3 * 2 * z.numel() * 4
    assert sum(region.stored for region in both) == z.numel() * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_slab_of_exponentials_is_written_once_and_no_logit_reaches_memory(architecture, on_gpu):
    n, vocabulary, size = 132, 304, 128
    weight = random(vocabulary, size) / 16
    with on_gpu(architecture) as session:
        out = torch.empty(n, vocabulary, dtype=BF16)
        exponentials.exponentials(random(n, size), weight, None, targets(n), out, 1.0, None, True)
    [memory] = [one.report.counts.memory for one in session.launches if one.kernel == "exponentials_kernel"]
    assert memory["slab"].stored == n * vocabulary * 2
    assert memory["slab"].loaded == 0
    assert sum(region.stored for region in memory.values()) == n * vocabulary * 2 + -(-vocabulary // 128) * n * 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reward_heads_read_each_hidden_number_once_in_each_direction(architecture):
    n, size, heads = 48, 208, 3
    hidden, head = random(n, size), random(heads, size)
    options, labels = Options("gail", 0.5, 0.0, False, 20.0), torch.tensor([True, False])
    cu_seqlens = torch.tensor([0, 20, n], dtype=torch.int32)
    inputs = hidden, head, None, None, cu_seqlens, True, labels, None, options
    forward = traffic(architecture, rewards.forward, *inputs)
    slopes = random(n, heads, dtype=FP32)
    backward = traffic(architecture, rewards.backward, hidden, head, slopes, None, [True, True, True])
    assert forward["hidden"].loaded == backward["hidden"].loaded == backward["d_hidden"].stored == n * size * 2


def test_the_page_has_the_counts_of_the_kernels():
    """``python -m tests.ptx.roofline`` writes them anew. Another version of Triton may count differently."""
    assert roofline.PAGE.read_text(encoding="utf-8") == roofline.page()
