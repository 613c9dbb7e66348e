"""flex_attention's block mask of a packed row: no attended block is missing, and no whole block has a masked pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from irlfast.data.packing import Layout, PromptGroup, pack
from irlfast.models.masks import BLOCK, block_mask, dense_mask

LENGTH = st.integers(1, 3 * BLOCK)
GROUPS = st.lists(st.tuples(LENGTH, st.lists(LENGTH, min_size=1, max_size=3)), min_size=1, max_size=5)


def groups_of(lengths) -> list[PromptGroup]:
    return [PromptGroup([1] * prompt, tuple([2] * answer for answer in answers)) for prompt, answers in lengths]


def by_blocks(batch, window) -> torch.Tensor:
    """Return the pairs that attend in the dense mask, by blocks: ``[B, blocks, blocks, BLOCK * BLOCK]`` bool."""
    attends = dense_mask(torch.float32, batch, window)[:, 0] == 0
    padding = -attends.shape[1] % BLOCK
    attends = pad(attends, (0, padding, 0, padding))
    return attends.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3).flatten(3)


def listed_blocks(numbers: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the blocks that a ``BlockMask`` lists, ``[B, blocks, blocks]`` bool."""
    kept = torch.arange(indices.shape[-1]) < numbers[..., None]
    return torch.zeros_like(kept).scatter(-1, indices.long(), kept)[:, 0]


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.sampled_from([None, 1, 100, 300]), st.booleans(), st.booleans())
def test_the_block_mask_is_the_dense_mask_by_blocks(lengths, window, shared, one_row):
    batch = pack(groups_of(lengths), Layout(shared=shared, one_row=one_row))
    exact, mask = by_blocks(batch, window), block_mask(batch, window)
    part = listed_blocks(mask.kv_num_blocks, mask.kv_indices)
    whole = listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (part & whole).any()
    assert torch.equal(exact.any(-1) | part | whole, part | whole)
    assert torch.equal(whole & exact.all(-1), whole)


@pytest.mark.parametrize("window", [None, 300])
def test_few_blocks_are_computed_without_an_attending_pair(window):
    draw = np.random.default_rng(0)
    lengths = [(draw.integers(1, 600), draw.integers(1, 400, 3)) for _ in range(9)]
    batch = pack(groups_of(lengths), Layout(one_row=True))
    exact, mask = by_blocks(batch, window), block_mask(batch, window)
    part, whole = int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())
    assert part + whole <= 1.1 * exact.any(-1).sum()
    assert whole >= 0.9 * exact.all(-1).sum() > 0
