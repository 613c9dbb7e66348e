"""Which tokens share a slab: whole groups, packed by best fit, and chunks of a group that exceeds the buffer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast import ops
from irlfast.ops.common.types import HeadInputs
from irlfast.ops.pair_loss import checks, cpu_slab, slab
from tests.helpers.ops_cases import Recorder, make

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
    tokens, slabs = slab.plan(cpu_slab.EXACT, head, scored, coupled)
    assert all(1 <= size <= rows_in_buffer for sizes in slabs for size in sizes)
    assert torch.equal(tokens.sort().values, scored.indices())
    slab_of = torch.arange(len(slabs)).repeat_interleave(
        torch.tensor([sum(sizes) for sizes in slabs], dtype=torch.long)
    )
    for pair in pairs:
        numbers = {
            number
            for token, number in zip(tokens.tolist(), slab_of.tolist(), strict=True)
            if scored.sequence_ids[token] in pair
        }
        assert len(numbers) <= 1


def launches(groups: int, reference: str, **options: object) -> int:
    """The operations of a call whose groups have a slab each."""
    case = make([128] * (2 * groups), vocabulary=16, dtype=torch.float32, reference=reference)
    with Recorder() as recorder:
        ops.pair_loss(**case, beta=0.1, buffer_mb=slab.SLAB_ROWS * 16 * 4 / 2**20, backend="cpu", **options)
    return recorder.launches


@pytest.mark.parametrize(
    ("reference", "options", "most"),
    [
        ("token", {}, 28),
        ("none", {}, 27),
        ("sequence", {}, 29),
        ("hidden", {}, 29),
        ("token", {"nll_weight": 0.1}, 29),
        ("token", {"loss_type": "ipo"}, 26),
        ("token", {"loss_type": ["sigmoid", "ipo"]}, 38),
        ("token", {"f_divergence_type": "js_divergence"}, 28),
    ],
)
def test_a_slab_runs_no_more_operations_than_these_beside_its_products_and_softmax(
    reference, options, most, monkeypatch
):
    """On a GPU, a small slab takes as long as its launches. What does not change between slabs is computed once."""
    values, product = torch.ones(slab.SLAB_ROWS), torch.ones(slab.SLAB_ROWS, 8)
    free = slab.SlabKernels(
        slab_mb=1,
        logits=lambda hidden, weight, out: None,
        softmax=lambda z, *_: (values, values, z),
        times_weight=lambda slab, weight: product,
        add_times_hidden=lambda *_: None,
    )
    monkeypatch.setattr(cpu_slab, "kernels", lambda operands: free)
    assert launches(3, reference, **options) - launches(2, reference, **options) <= most
