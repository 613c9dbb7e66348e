"""Every Triton kernel, compiled for sm_80 and sm_90, runs without a finding and agrees with fp64."""

import pytest
import torch

from irlfast.kernels import linear, rewards, scale
from tests.helpers import reward_cases
from tests.helpers.divergence_cases import KINDS
from tests.helpers.reward_cases import FORMS, POOLINGS, labels_of, options_of
from tests.helpers.tiers import sweep
from tests.kernels.test_rewards import check_head, check_loss
from tests.ops.test_logits import OPTIONS
from tests.ptx import cases
from tests.ptx.driver import ARCHITECTURES

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SOFTCAPS = [None, 3.0]


@sweep(vocabulary=[2, 37, 5000, 8208], dtype=DTYPES, options=OPTIONS, gap=[0, 3], architecture=ARCHITECTURES)
def test_logits_and_their_gradient(vocabulary, dtype, options, gap, architecture, on_gpu):
    with on_gpu(architecture):
        cases.check_logits(vocabulary, dtype, options, [2, 0, 1], gap)


def test_a_vocabulary_of_one_token(session):
    cases.check_logits(1, torch.float32, {}, [2, 0, 1])


def test_sums_of_sequences(session):
    cases.check_sums([5, 0, 1030, 1])


@sweep(vocabulary=[7, 1001, 17000], dtype=DTYPES, bias=[False, True], softcap=SOFTCAPS, architecture=ARCHITECTURES)
def test_softmax_of_the_slab(vocabulary, dtype, bias, softcap, architecture, on_gpu):
    with on_gpu(architecture):
        cases.check_slab(vocabulary=vocabulary, dtype=dtype, bias=bias, softcap=softcap)


@pytest.mark.parametrize("scale", [-0.7, 0.3])
def test_softmax_of_the_slab_with_a_scale(scale, session):
    cases.check_slab(vocabulary=37, dtype=torch.bfloat16, scale=scale)


@sweep(count=[1, 2048, 2049, 6000], dtype=DTYPES, architecture=ARCHITECTURES)
def test_product_with_a_factor(count, dtype, architecture, on_gpu):
    values, factor = torch.randn(count), torch.tensor(0.3)
    with on_gpu(architecture):
        result = scale.scaled(values, factor, dtype)
    torch.testing.assert_close(result, (values * factor).to(dtype), rtol=0, atol=0)


@pytest.fixture
def few_programs(monkeypatch):
    """Each program then takes several tiles of the vocabulary, or several blocks of rows."""
    monkeypatch.setattr(linear, "PROGRAMS", 2)
    monkeypatch.setattr(linear, "PARTS", 2)
    monkeypatch.setattr(rewards, "PROGRAMS", 2)


# The rows of 132 tokens take two programs. 384 and 332 columns of hidden states are six steps of the loads in flight.
@sweep(size=[384, 332], vocabulary=[304, 301], dtype=DTYPES, softcap=SOFTCAPS, architecture=ARCHITECTURES)
def test_fused_projection(size, vocabulary, dtype, softcap, architecture, on_gpu, few_programs):
    narrow = 4 if dtype == torch.float32 else 1  # a tile has a quarter of the columns, and a step half
    sizes = {"vocabulary": vocabulary // narrow, "size": size // narrow, "bias": size == 384}
    with on_gpu(architecture):
        cases.check_fused([70, 0, 62], dtype=dtype, softcap=softcap, **sizes)


# 700 tokens of the vocabulary are six tiles, and 130 tokens of a batch three blocks of the products over heavy tiles.
@sweep(size=[384, 203], vocabulary=[704, 701], softcap=SOFTCAPS, architecture=ARCHITECTURES)
def test_exponentials_in_the_epilogue_and_products_over_heavy_tiles(size, vocabulary, softcap, architecture, on_gpu):
    with on_gpu(architecture):
        cases.check_epilogue([70, 62], vocabulary=vocabulary, size=size, softcap=softcap)


@sweep(
    kind=KINDS, share=[0.5, 0.1], dtype=DTYPES, vocabulary=[7, 4100, 4112], softcap=SOFTCAPS, architecture=ARCHITECTURES
)
def test_divergence(kind, share, dtype, vocabulary, softcap, architecture, on_gpu):
    with on_gpu(architecture):
        cases.check_divergence(kind=kind, share=share, dtype=dtype, vocabulary=vocabulary, softcap=softcap)


LENGTHS = [5, 3, 0, 40]


@sweep(size=[8, 200, 784, 1001], heads=[1, 3, 64], dtype=DTYPES, pooling=POOLINGS, architecture=ARCHITECTURES)
def test_reward_heads(size, heads, dtype, pooling, architecture, on_gpu, few_programs):
    case = reward_cases.make(LENGTHS, size=size, heads=heads, dtype=dtype, bias=heads == 3, rows=heads != 1)
    with on_gpu(architecture):
        check_head(case, pooling)


@sweep(form=FORMS, dtype=DTYPES[:2], architecture=ARCHITECTURES)
def test_discriminator_losses(form, dtype, architecture, on_gpu):
    name, pooling = form
    case = reward_cases.make(LENGTHS, size=40, dtype=dtype)
    with on_gpu(architecture):
        check_loss(case, labels=labels_of(LENGTHS), pooling=pooling, **options_of(name))


@pytest.mark.parametrize(("name", "pooling"), [("gail", "token"), ("bradley_terry", "last")])
def test_discriminator_losses_of_many_sequences(name, pooling, session):
    """A program counts 256 sequences or items of pairs per iteration."""
    lengths = [1, 0] * 150
    case = reward_cases.make(lengths, size=8, heads=1, rows=False, dtype=torch.bfloat16)
    check_loss(case, labels=labels_of(lengths), pooling=pooling, **options_of(name))
