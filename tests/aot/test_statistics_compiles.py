"""The kernels of token_statistics compile for sm_80 and sm_90, without spills."""

import pytest
import torch

pytest.importorskip("triton")

from irlfast.kernels import statistics
from tests.helpers.aot import check_compiles, launches_of
from tests.helpers.tiers import sweep


@sweep(
    vocabulary=[7, 50257, 128256],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    softcap=[None, 30.0],
)
def test_statistics_of_rows_and_their_gradient_compile(vocabulary, dtype, softcap):
    logits = torch.empty(2, vocabulary, dtype=dtype, device="meta")
    rows = [torch.empty(2, device="meta") for _ in range(4)]
    targets = torch.empty(2, dtype=torch.long, device="meta")
    [forward] = launches_of(statistics.token_statistics, logits, targets, 0.5, softcap)
    [backward] = launches_of(statistics.write_gradient, logits, logits, targets, *rows, 0.5, softcap)
    check_compiles(forward, vocabulary, dtype)
    check_compiles(backward, vocabulary, dtype)
