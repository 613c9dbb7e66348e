"""The kernels of token_logps and logits_log_ratio compile for sm_80 and sm_90, without spills."""

import pytest
import torch

pytest.importorskip("triton")
from tests.helpers.aot import check_compiles, launches_of
from tests.helpers.tiers import sweep

TOKENS = 16
SIZES = [1, 50257, 128256]  # a 1 is compiled in; rows that no vector fits; and that 16 bytes do
DTYPES = [torch.float32, torch.bfloat16]


def inputs(vocabulary: int, dtype: torch.dtype, reference: bool) -> tuple[torch.Tensor, ...]:
    logits = torch.empty(TOKENS, vocabulary, dtype=dtype, device="meta")
    return logits, torch.empty(TOKENS, dtype=torch.long, device="meta"), logits if reference else None


@sweep(vocabulary=SIZES, dtype=DTYPES, reference=[False, True], softcap=[None, 30.0])
def test_forward_compiles(vocabulary, dtype, reference, softcap):
    from irlfast.kernels import logits as kernels

    arguments = inputs(vocabulary, dtype, reference)
    [launch] = launches_of(kernels.token_logps, *arguments, 0.5, softcap)
    check_compiles(launch, vocabulary, dtype)


@sweep(vocabulary=SIZES, dtype=DTYPES, softcap=[None, 30.0])
def test_backward_compiles(vocabulary, dtype, softcap):
    from irlfast.kernels import logits as kernels

    logits, targets, _ = inputs(vocabulary, dtype, False)
    lse = torch.empty(TOKENS, device="meta")
    [launch] = launches_of(kernels.write_gradient, logits, logits, targets, lse, lse, 0.5, softcap)
    check_compiles(launch, vocabulary, dtype)


@sweep(dtype=[*DTYPES, torch.float64], sizes=[(4, None), (4, TOKENS), (4, 4), (1, 1)])
def test_sums_compile(sizes, dtype):
    from irlfast.kernels import logits as kernels

    sequences, reference = sizes
    logps, targets = torch.empty(TOKENS, device="meta"), torch.empty(TOKENS, dtype=torch.long, device="meta")
    cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    ref_logps = None if reference is None else torch.empty(reference, dtype=dtype, device="meta")
    [launch] = launches_of(kernels.sequence_sums, logps, targets, cu_seqlens, ref_logps)
    check_compiles(launch, reference, dtype)
