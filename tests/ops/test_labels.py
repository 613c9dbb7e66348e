"""flatten_labels: every operation on labels ``[B, T]`` gives what a loop over positions gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast import ops


@st.composite
def labelled(draw):
    """Hidden states, a head, labels with skipped tokens, and how they are meant."""
    count, length, vocabulary = draw(st.integers(0, 4)), draw(st.integers(0, 5)), 6
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ignore_index = draw(st.sampled_from([-100, -1, 0, vocabulary]))
    labels = torch.randint(
        vocabulary, (count, length), generator=random, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
    )
    labels[torch.rand(count, length, generator=random) < 0.4] = ignore_index
    hidden = torch.randn(count, length, 3, generator=random).double()
    return hidden, torch.randn(vocabulary, 3, generator=random).double(), labels, draw(st.booleans()), ignore_index


@settings(max_examples=40, deadline=None, derandomize=True)
@given(labelled())
def test_each_position_scores_the_label_that_it_predicts(case):
    hidden, weight, labels, shifted, ignore_index = case
    count, length = labels.shape
    flat = ops.flatten_labels(labels, shifted=shifted, ignore_index=ignore_index)
    expected = torch.zeros(count, length).double()
    for b in range(count):
        for t in range(length if shifted else length - 1):
            label = labels[b, t if shifted else t + 1]
            if label != ignore_index:
                expected[b, t] = (weight @ hidden[b, t]).log_softmax(0)[label]
    result = ops.log_ratio(hidden.flatten(0, 1), weight, *flat)
    torch.testing.assert_close(result.token_logps.view(count, length), expected)
    torch.testing.assert_close(result.policy_logps, expected.sum(1))
    logits = (hidden @ weight.T).flatten(0, 1)
    torch.testing.assert_close(ops.logits_log_ratio(logits, *flat).log_ratio, expected.sum(1))


def test_compiles_as_one_graph_of_any_size():
    torch.compiler.reset()
    compiled = torch.compile(ops.flatten_labels, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3), (4, 5), (3, 7)):
        labels = torch.randint(-2, 5, shape)
        for shifted in (False, True):
            expected = ops.flatten_labels(labels, shifted=shifted, ignore_index=-1)
            actual = compiled(labels, shifted=shifted, ignore_index=-1)
            assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("labels", [[1], torch.zeros(3).long(), torch.zeros(2, 3)], ids=["list", "1-d", "floats"])
def test_error_names_what_was_found_and_expected(labels):
    with pytest.raises(ValueError, match=r"labels: found .*expected \[B, T\] int64 or int32 on cpu"):
        ops.flatten_labels(labels, shifted=True)
