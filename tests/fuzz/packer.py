"""Prompt groups of any shape: every token is packed once, and every step's groups come in some process's batches."""

from array import array
from typing import Any

import numpy as np
from hypothesis import strategies as st

from irlfast.config import Config
from irlfast.data.batching import longest_of, micro_batches, plan_steps, token_limit
from irlfast.data.packing import PAD, Layout, PromptGroup, count_tokens, kept_length, pack, pieces_of
from irlfast.data.store import load_examples, make_examples, save_examples
from tests.fuzz.guards import fresh_folder, refusal

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=12)
prompts = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12)


@st.composite
def steps(draw: Any) -> tuple:
    """Draw groups with as many answers each, a layout, a limit of tokens, and a number of processes."""
    count = draw(st.integers(1, 4))
    answers = st.lists(tokens, min_size=count, max_size=count).map(tuple)
    groups = draw(st.lists(st.tuples(prompts, answers).map(lambda pair: PromptGroup(*pair)), min_size=1, max_size=10))
    if draw(st.booleans()):
        groups = [group._replace(teacher_prompt=draw(prompts)) for group in groups]
    costs = st.sampled_from([0.0, 0.5, 100.0])
    flags = st.booleans()
    layout = Layout(*draw(st.tuples(flags, flags, flags, costs, costs)))
    return groups, layout, draw(st.integers(1, 200)), draw(st.integers(1, 5))


INPUTS = steps()
EXAMPLES: list[Any] = []


def check(drawn: tuple) -> None:
    groups, layout, limit, ranks = drawn
    config = Config(max_tokens_per_batch=limit)
    message = refusal(token_limit, config, longest_of(groups, layout), len(groups), names=["max_tokens_per_batch"])
    assert bool(message) == (longest_of(groups, layout) > limit)
    step = plan_steps(len(groups), len(groups), epochs=1, steps=None, seed=[0])[0].tolist()
    each = [micro_batches(step, groups, layout, limit, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in each}) == 1
    taken = [i for batches in each for batch in batches for i in batch]
    assert sorted(taken) == sorted(step)
    for batch in (batch for batches in each for batch in batches if batch):
        check_batch([groups[i] for i in batch], layout)
    check_files(groups)


def check_batch(groups: list[PromptGroup], layout: Layout) -> None:
    """Check a batch against the groups, piece by piece."""
    batch = pack(groups, layout)
    pieces = [piece for group in groups for piece in pieces_of(group, layout)]
    flat, numbers = batch.input_ids.flatten().numpy(), batch.group.flatten().numpy()
    wanted = [ids for p in pieces for ids in (p.prompt, *(a[: kept_length(a, layout)] for a in p.answers))]
    assert flat[numbers != PAD].tolist() == [token for ids in wanted for token in ids]
    assert batch.targets.tolist() == [token for group in groups for answer in group.answers for token in answer]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum([len(a) for group in groups for a in group.answers])]
    if layout.keep_last_token:
        assert flat[batch.rows.numpy()].tolist() == batch.targets.tolist()
    assert (batch.teacher is None) == (groups[0].teacher_prompt is None)
    assert layout.one_row or batch.input_ids.shape[0] == len(pieces)
    assert sum(count_tokens(group, layout) for group in groups) >= int((numbers != PAD).sum())


def check_files(groups: list[PromptGroup]) -> None:
    """Check that examples come back from the file that all processes map."""
    sequences = [ids for group in groups for ids in (group.prompt, group.answers[0], [], [])]
    tokens = memoryview(array("i", [token for ids in sequences for token in ids]))
    lengths, rows = np.array([len(ids) for ids in sequences], np.int32), np.arange(len(groups), dtype=np.int32)
    path = fresh_folder() / "examples.safetensors"
    save_examples(path, make_examples(tokens, lengths, rows))
    kept = [(x.prompt_ids.tolist(), x.answer_ids.tolist(), x.row) for x in load_examples(path)]
    assert kept == [(group.prompt, group.answers[0], row) for row, group in enumerate(groups)]
