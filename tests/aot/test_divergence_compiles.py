"""The kernel of token_divergence compiles for sm_80 and sm_90, without spills."""

import pytest
import torch

pytest.importorskip("triton")

from irlfast.kernels.divergence import divergence
from irlfast.ops.divergence.mixtures import DIVERGENCES
from tests.helpers.aot import check_compiles, launches_of
from tests.helpers.tiers import sweep

SOFTCAPS = [(None, None), (30.0, 20.0)]


@sweep(
    kind=["forward_kl", "jensen_shannon"],  # a pure one, and one with a mixture
    vocabulary=[7, 50257, 128256],
    dtype=[None, torch.float32, torch.bfloat16, torch.float16],
    bias=[False, True],
    softcaps=SOFTCAPS,
)
def test_divergence_of_rows_compiles(kind, vocabulary, dtype, bias, softcaps):
    z, r = (torch.empty(2, -(-vocabulary // 16) * 16)[:, :vocabulary] for _ in range(2))
    bias = torch.empty(vocabulary, dtype=dtype or torch.bfloat16) if bias else None
    mixture = DIVERGENCES[kind](0.3, 0.1)
    softcap, ref_softcap = softcaps
    [launch] = launches_of(divergence, z, bias, 0.5, softcap, r, bias, 0.5, ref_softcap, mixture, dtype)
    check_compiles(launch, kind, vocabulary, dtype)
