"""Packing: answers that share a prompt have the scores and the gradients of separate sequences."""

import copy
import json
import pickle
import re

import numpy as np
import pytest
import torch
import transformers

from irlfast import ops
from irlfast.config import make_config
from irlfast.data.batching import cost_of, micro_batches
from irlfast.data.packing import PAD, Batch, Layout, PromptGroup, count_tokens, pack
from irlfast.losses.inputs import arguments
from irlfast.models.forward import hidden_states
from irlfast.ops import lm_head
from irlfast.sampling.scoring import score_share, token_logps
from tests.helpers.scores import by_group
from tests.helpers.tiers import first_then_full

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": transformers.LlamaConfig(**SHAPE),
    "Mistral, window 4": transformers.MistralConfig(**SHAPE, sliding_window=4),
    "Qwen2": transformers.Qwen2Config(**SHAPE),
    "Qwen3, one layer with window 5": transformers.Qwen3Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "Gemma2, soft-cap, window 4": transformers.Gemma2Config(
        **SHAPE, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8
    ),
    "GPT-NeoX": transformers.GPTNeoXConfig(**{key: SHAPE[key] for key in SHAPE if "key_value" not in key}),
    "GPT-2, learned positions": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name])).eval()


def ragged() -> list[PromptGroup]:
    """Three answers each: long ones, of one token, with a prompt of one token, and an empty one."""
    draw = np.random.default_rng(0)
    lengths = [(7, (6, 9, 2)), (1, (5, 1, 12)), (15, (1, 1, 3)), (4, (8, 0, 8))]
    return [
        PromptGroup(
            draw.integers(1, VOCABULARY, prompt).tolist(),
            tuple(draw.integers(1, VOCABULARY, length).tolist() for length in answers),
        )
        for prompt, answers in lengths
    ]


def scored(model, batch) -> torch.Tensor:
    return ops.log_ratio(hidden_states(model, batch), **arguments(lm_head(model), batch), backend="plain").token_logps


def with_gradients(model, batches) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logps = torch.cat([scored(model, batch) for batch in batches])
    (logps * torch.linspace(-1, 1, logps.numel(), device=logps.device)).sum().backward()
    return logps.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def separate(groups: list[PromptGroup]) -> list:
    """The oracle: every answer in a batch of its own, without mask, padding or shared prompt."""
    answers = [PromptGroup(group.prompt, (answer,)) for group in groups for answer in group.answers]
    return [pack([answer]) for answer in answers]


LAYOUTS = [Layout(), Layout(shared=False), Layout(one_row=True), Layout(shared=False, one_row=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_answers_have_the_log_probabilities_and_gradients_of_separate_ones(name, layout):
    model, groups = model_of(name), ragged()
    expected, gradients = with_gradients(model, separate(groups))
    actual, packed_gradients = with_gradients(model, [pack(groups, layout)])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


@pytest.mark.parametrize("name", first_then_full(["Llama", "Mistral, window 4", "GPT-NeoX"], others=1))
def test_flex_attention_attends_to_the_same_tokens_as_the_dense_mask(name):
    model, batch = model_of(name), pack(ragged(), Layout(one_row=True))
    with torch.no_grad():
        expected = hidden_states(model, batch)[batch.rows]
        model.set_attn_implementation("flex_attention")
        actual = hidden_states(model, batch)[batch.rows]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_scores_are_sent_to_other_processes_without_the_rest_of_their_batch(tmp_path):
    """A view of each answer's would be sent with all of the memory behind it, or with an object of its own."""
    model_of("Llama").save_pretrained(tmp_path)
    config = make_config({"dataset_name": __file__, "model_name_or_path": str(tmp_path), "dtype": "float32"})
    groups = [group._replace(answers=group.answers * 50) for group in ragged()]
    share = score_share(config, tmp_path, groups, tmp_path / "scores", token_logps, heads=0, in_4bit=False)
    scores = by_group(share)
    answers = [(ids, logps) for i, x in enumerate(groups) for ids, logps in zip(x.answers, scores[i], strict=True)]
    assert len(answers) >= 150
    assert all(len(ids) == len(logps) for ids, logps in answers)
    assert len(pickle.dumps(share)) < sum(array.nbytes for array in share) + 1000
    assert share.values.nbytes == 4 * sum(len(ids) for ids, _ in answers)


def test_the_batch_that_the_docstring_draws_is_the_one_that_is_packed():
    batch = pack([PromptGroup([5, 6, 7], ([11, 12, 13, 2], [21, 2]))])
    drawn = dict(re.findall(r'"(\w+)": +(\[.*?\]),', Batch.__doc__))
    assert len(drawn) == 7
    for name, values in drawn.items():
        assert getattr(batch, name).flatten().tolist() == json.loads(values), name


def test_a_batch_has_a_prompt_once_and_no_last_tokens():
    [group] = [PromptGroup([1] * 10, ([2] * 4, [3] * 6))]
    batch = pack([group])
    assert count_tokens(group) == batch.input_ids.numel() == 10 + 3 + 5
    assert batch.rows.tolist() == [9, 10, 11, 12, 9, 13, 14, 15, 16, 17]
    assert batch.position_ids[0, [9, 10, 13]].tolist() == [9, 10, 10]


def drawn(count: int) -> list[PromptGroup]:
    draw = np.random.default_rng(1)
    sizes = draw.integers(1, 60, (count, 3))
    return [PromptGroup([1] * prompt, ([1] * first, [1] * second)) for prompt, first, second in sizes]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_gets_the_same_number_of_batches_at_like_cost_within_the_limit(layout, ranks):
    groups, step, layout = drawn(48), list(range(3, 45)), layout._replace(answer_cost=2.0, attended_cost=0.01)
    each = [micro_batches(step, groups, layout, 400, rank, ranks) for rank in range(ranks)]
    assert sorted(i for batches in each for batch in batches for i in batch) == step
    assert len({len(batches) for batches in each}) == 1
    for batch in (batch for batches in each for batch in batches):
        packed = pack([groups[i] for i in batch], layout)
        assert packed.input_ids.numel() <= (512 if layout.one_row else 400)  # one row ends on a multiple of 128
    costs = [sum(cost_of(groups[i], layout) for batch in batches for i in batch) for batches in each]
    assert max(costs) <= 1.02 * min(costs)
    reversed_step = [micro_batches(step[::-1], groups, layout, 400, rank, ranks) for rank in range(ranks)]
    assert reversed_step == each


def test_rows_of_like_length_and_single_rows_have_little_padding():
    groups = drawn(64)
    for layout, share in ((Layout(), 0.1), (Layout(one_row=True), 0.07)):
        batches = [
            pack([groups[i] for i in chosen], layout) for chosen in micro_batches(range(64), groups, layout, 1024)
        ]
        pads = sum(int((batch.group == PAD).sum()) for batch in batches)
        assert pads <= share * sum(batch.group.numel() for batch in batches)


def test_fewer_prompt_groups_than_ranks_leave_empty_batches():
    assert sorted(micro_batches([0], drawn(1), Layout(), 400, rank, 2) for rank in (0, 1)) == [[[]], [[0]]]


def test_a_reward_models_rows_are_the_answers_own_tokens_with_the_last():
    """A policy's rows are the tokens before. Both hold whether answers share a prompt or not."""
    groups = [PromptGroup([7, 8], ([1, 2, 3], [4])), PromptGroup([9], ([5, 6], []))]
    for shared in (True, False):
        batch = pack(groups, Layout(shared=shared, keep_last_token=True))
        own = batch.input_ids.flatten()[batch.rows]
        assert own.tolist() == batch.targets.tolist() == [1, 2, 3, 4, 5, 6]
        assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 6]
        assert batch.position_ids.flatten()[batch.rows].tolist() == [2, 3, 4, 2, 1, 2]
