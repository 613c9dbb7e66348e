"""The kernels of reward_head and discriminator_loss compile for sm_80 and sm_90, without spills."""

import pytest
import torch

from irlfast.ops.rewards.losses import Options
from tests.helpers.aot import Launch, check_compiles, launches_of
from tests.helpers.tiers import full, sweep

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = [
    None,
    Options("bce", 0.5, 0.1, False, 20.0),
    Options("airl", 0.5, 0.0, False, 20.0),
    Options("gail", 0.5, 0.0, False, 20.0),
    Options("fairl", 0.5, 0.0, True, 20.0),
    Options("alpha", 0.3, 0.0, False, 20.0),
]
BRADLEY_TERRY = Options("bradley_terry", 0.5, 0.1, False, 20.0)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(
    tokens: int,
    size: int,
    heads: int,
    dtype: torch.dtype,
    token: bool,
    options: Options | None,
    pairs: bool = False,
    sequences: int = 32,
) -> Launch:
    from irlfast.kernels.rewards import forward as launcher

    hidden, head = meta(tokens, size, dtype=dtype), meta(heads, size, dtype=dtype)
    bias, rows = (None, None) if token else (meta(heads, dtype=dtype), meta(tokens, dtype=torch.int64))
    [launch] = launches_of(
        launcher,
        *(hidden, head, bias, rows, meta(sequences + 1, dtype=torch.int32), token),
        meta(sequences, dtype=torch.bool),
        meta(8, 2, dtype=torch.int64) if pairs else None,
        options,
    )
    return launch


@full
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options and options.kind)
def test_forward_of_every_kind_compiles(options):
    check_compiles(forward(65536, 4096, 8, torch.bfloat16, True, options), options)


@full
@pytest.mark.parametrize("options", OPTIONS[:2], ids=lambda options: options and options.kind)
def test_forward_of_a_single_sequence_compiles(options):
    check_compiles(forward(64, 4096, 1, torch.bfloat16, True, options, sequences=1), options)


@pytest.mark.parametrize(("dtype", "pairs"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_forward_of_pairs_compiles(dtype, pairs):
    check_compiles(forward(8192, 4096, 1, dtype, False, BRADLEY_TERRY, pairs), dtype, "pairs", pairs)


@sweep(sizes=[(1000, 3, False), (4096, 1, True), (4096, 8, True), (4096, 64, False)], dtype=DTYPES)
def test_forward_of_other_sizes_compiles(dtype, sizes):
    size, heads, token = sizes
    check_compiles(forward(65536, size, heads, dtype, token, OPTIONS[3]), dtype, size, heads)


@sweep(sizes=[(4096, 8), (1000, 3), (4096, 64)], dtype=DTYPES)
def test_backward_compiles(dtype, sizes):
    from irlfast.kernels.rewards import backward

    size, heads = sizes
    hidden, head = meta(65536, size, dtype=dtype), meta(heads, size, dtype=dtype)
    for wanted in ([True, True, True], [False, True, True]) if heads == 8 else ([True, True, False],):
        [launch] = launches_of(backward, hidden, head, meta(65536, heads), meta(), wanted)
        check_compiles(launch, dtype, size, heads, wanted)
