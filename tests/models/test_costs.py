"""Counted operations are those that torch counts."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from irlfast.data.packing import Layout, PromptGroup, pack, token_counts
from irlfast.models.costs import costs_of, operations
from irlfast.models.forward import hidden_states


@pytest.mark.parametrize("shared", [True, False])
def test_operations_are_those_that_torch_counts(shared):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=61, attn_implementation="eager", **shape)
    model, layout = LlamaForCausalLM(config), Layout(shared)
    groups = [PromptGroup([1] * 9, ([2] * 5, [3] * 5))]  # without padding, which is not counted
    batch = pack(groups, layout)
    with FlopCounterMode(display=False) as counter:
        rows = hidden_states(model, batch)[batch.rows]
        (rows @ model.lm_head.weight.T).sum().backward()
    counts = token_counts(groups, layout)
    assert counts["answer_tokens"] == 10
    assert counts["tokens"] == batch.input_ids.numel()
    # Eager attention computes whole squares.
    masked = sum(row.numel() ** 2 for row in batch.input_ids) - counts["attended"]
    ours = operations(costs_of(model, model.lm_head.weight), counts) + 12 * 2 * 32 * masked
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)  # norms are not products
