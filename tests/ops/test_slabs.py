"""Which tokens share a slab: whole groups, packed by best fit, and chunks of a group that exceeds the buffer."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.ops.common.types import HeadInputs
from irlfast.ops.pair_loss import checks, cpu_slab, slab

sizes_of_groups = st.lists(st.integers(0, 300), max_size=60)


@settings(derandomize=True, deadline=None)
@given(sizes_of_groups, st.integers(1, 300))
def test_no_two_slabs_fit_into_one_and_none_has_more_than_its_rows(sizes, usual):
    slabs = slab.best_fit(sizes, usual)
    groups: dict[int, list[int]] = {}
    for number, size in zip(slabs, sizes, strict=True):
        groups.setdefault(number, []).append(size)
    assert sorted(groups) == list(range(len(groups)))
    totals = sorted(sum(group) for group in groups.values())
    assert all(sum(group) <= usual or len([size for size in group if size]) == 1 for group in groups.values())
    assert len(totals) < 2 or totals[0] + totals[1] > usual


def test_best_fit_needs_fewer_slabs_than_the_order_of_arrival():
    assert slab.best_fit([200, 100, 150, 50], 256) == [0, 1, 1, 0]  # in the order of arrival: 200, 100 + 150, 50


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).flatmap(
        lambda lengths: st.tuples(
            st.just(lengths),
            st.lists(st.tuples(*[st.integers(0, len(lengths) - 1)] * 2), max_size=8),
            st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)),
            st.integers(1, 40),
        )
    )
)
def test_every_scored_token_is_in_one_slab_with_its_whole_group(problem):
    lengths, pairs, skipped, rows_in_buffer = problem
    count, vocabulary = sum(lengths), 8
    head = HeadInputs(torch.zeros(count, 4), torch.zeros(vocabulary, 4), None)
    targets = torch.zeros(count, dtype=torch.long)
    targets[torch.tensor(skipped, dtype=torch.bool)] = -100
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    buffer_mb = rows_in_buffer * vocabulary * 4 / 2**20
    scored = checks.check_scored(head, targets, cu_seqlens, None, 1.0, None, buffer_mb)
    coupled = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    slabs = slab.plan(cpu_slab.EXACT, head, scored, coupled)
    assert all(1 <= len(chunk) <= rows_in_buffer for chunks in slabs for chunk in chunks)
    tokens = torch.cat([torch.zeros(0, dtype=torch.long), *(chunk for chunks in slabs for chunk in chunks)])
    assert torch.equal(tokens.sort().values, scored.indices())
    slab_of = {token: number for number, chunks in enumerate(slabs) for token in torch.cat(chunks).tolist()}
    for pair in pairs:
        numbers = {slab_of[token] for token in tokens.tolist() if scored.sequence_ids[token] in pair}
        assert len(numbers) <= 1
