"""The token limit of a batch: as configured, raised to what memory holds, halved after memory ran out."""

import re

import numpy as np
import pytest
import torch

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.batching import longest_of, token_limit
from irlfast.data.packing import Layout, PromptGroup
from irlfast.engine import memory
from irlfast.engine.memory import OutOfMemory, TokenLimit, allowed_tokens, fitting_tokens, out_of_memory
from irlfast.engine.step import prepare_steps
from irlfast.sampling import scoring
from tests.data.test_packing import model_of, ragged
from tests.helpers.runs import ended, printed, settings
from tests.helpers.scores import by_group
from tests.helpers.tiers import full

AUTO = make_config({"dataset_name": __file__, "model_name_or_path": "."})


def test_a_prompt_group_longer_than_the_limit_is_an_error_of_one_sentence():
    config = make_config({"dataset_name": __file__, "model_name_or_path": ".", "max_tokens_per_batch": 16})
    with pytest.raises(InputError, match="max_tokens_per_batch: found 16, but the longest prompt has 18 tokens"):
        token_limit(config, longest_of([PromptGroup([1] * 10, ([2] * 4, [3] * 6))], Layout()), 1)


def test_the_limit_is_at_most_half_of_what_was_too_much_and_at_least_a_prompt_group():
    groups = [PromptGroup([1] * 10, ([2] * 4, [3] * 6))] * 3  # 18 tokens
    longest = longest_of(groups, Layout())
    limits = {most: token_limit(AUTO, longest, 3, most) for most in (2000, 512, 20, 10)}
    assert limits == {2000: 1024, 512: 512, 20: 20, 10: 18}


def test_a_single_prompt_group_that_is_too_large_leaves_no_note_because_another_machine_may_hold_it(tmp_path):
    folder = tmp_path / "sft" / "checkpoint"
    for tokens, error in ((40, OutOfMemory), (18, InputError)):
        assert isinstance(out_of_memory(TokenLimit(tokens, auto=True, least=18), folder), error)
        assert allowed_tokens(folder) == 20


# ---------------------------------------------------------------- raised to what memory holds


def test_tokens_that_fit_take_nine_tenths_of_the_memory_if_it_grows_with_the_tokens():
    base, each, fixed, total = 10_000, 30, 5_000, 200_000
    count = 1000
    fits = fitting_tokens(count, base, base + fixed + each * count, total)
    assert 0.8 * total < base + fixed + each * fits <= 0.9 * total  # memory that does not grow leaves room
    assert fitting_tokens(count, base, base + each * count, total) == (0.9 * total - base) // each
    assert fitting_tokens(count, int(0.95 * total), total, total) < 0  # no room at all: the caller keeps its limit
    assert fitting_tokens(count, base, base, total) > count  # no growth was measured


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with 10,000 bytes of memory, of which 1,000 are always in use, and 2 per token."""
    largest = [0]
    monkeypatch.setattr(memory, "gpu_memory", lambda: (1000, 1000 + 2 * largest[0], 10_000))
    return largest


@pytest.mark.parametrize("most", [10_000, 2000])
def test_batches_grow_to_what_fits_after_the_second_step_was_measured(gpu, most, capsys):
    groups = [PromptGroup([1] * 30, ([2] * 20, [3] * 20))] * 64  # 68 tokens each
    steps, tokens = [np.arange(64)] * 5, []
    limit = TokenLimit(140, auto=True, most=most)
    for step, prepared in enumerate(prepare_steps(steps, groups, Layout(), limit), 1):
        tokens.append([batch.input_ids.numel() for batch in prepared.batches])
        gpu[0] = max(tokens[-1])
        limit.fit_to_memory(step, prepared.largest())
    assert tokens[:3] == [[136] * 32] * 3  # the third is made while the second runs
    fits = min(4000, most)
    assert tokens[3] == tokens[4]
    assert fits - 68 < max(tokens[3]) <= fits
    assert sum(tokens[3]) == sum(tokens[0])
    assert f"140 tokens to start with, {fits:,} after" in capsys.readouterr().err


def after_steps(limit):
    limits = []
    for step in (1, 2, 3):
        limit.fit_to_memory(step, 100)
        limits.append(limit.tokens)
    return limits


def test_a_measurement_never_lowers_the_limit_and_never_changes_a_given_one(gpu):
    gpu[0] = 100
    assert after_steps(TokenLimit(9000, auto=True)) == [9000] * 3
    assert after_steps(TokenLimit(200, auto=True)) == [200, 4000, 4000]
    assert after_steps(TokenLimit(500, auto=False)) == [500] * 3


def test_a_cpu_measures_nothing():
    assert memory.gpu_memory() is None
    assert after_steps(TokenLimit(1024, auto=True)) == [1024] * 3


# ---------------------------------------------------------------- out of memory

SFT = {"method": "sft", "inner_steps": "null", "global_batch_size": 32}


def short_of_memory(folder, most, **keys):
    return ["-m", "tests.helpers.short_of_memory", str(most), *settings(folder / "run", **SFT | keys)]


@pytest.mark.parametrize(("most", "code"), [(300, 0), pytest.param(10, 2, marks=full)])
def test_out_of_memory_halves_the_batches_until_one_prompt_group_is_left(tmp_path, most, code):
    _, err = printed(short_of_memory(tmp_path, most), code=code)
    assert (
        "sft: out of memory with 1,024 tokens per batch; continues from the last checkpoint with half the tokens" in err
    )
    if code:
        assert re.search(
            r"out of memory with \d+ tokens per batch, one prompt and its answers; exp", err.splitlines()[-1]
        )
        assert not (tmp_path / "run" / "sft" / "policy").exists()


@full
def test_one_of_several_processes_out_of_memory_says_so_and_all_restart_with_half_the_tokens(tmp_path):
    """The same command runs until the batches fit."""
    said = (
        r"irlfast, process 1: sft: out of memory with [\d,]+ tokens per batch; the same command continues from the last"
    )
    for _ in range(4):
        code, _, err = ended(short_of_memory(tmp_path, 700), 2)
        if code == 0:
            break
        assert re.search(said, err), err
    assert code == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "sft" / "checkpoint").exists()


def test_a_given_limit_is_not_halved(tmp_path):
    _, err = printed(short_of_memory(tmp_path, 300, max_tokens_per_batch=400), code=2)
    assert "sft: out of memory with 400 tokens per batch; expected a lower max_tokens_per_batch" in err.splitlines()[-1]


def test_a_split_model_that_runs_out_of_memory_ends_the_run_because_the_processes_halve_no_batch_apart(
    tmp_path, monkeypatch
):
    model_of("Llama").save_pretrained(tmp_path)
    groups = [group for group in ragged() if all(group.answers)]

    def short(model, batch):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(scoring, "is_split", lambda model: True)
    monkeypatch.setattr(scoring, "hidden_states", short)
    with pytest.raises(
        InputError, match="out of memory with a model that zero_stage 3 splits; expected a lower max_tok"
    ):
        scoring.score_share(AUTO, tmp_path, groups, tmp_path / "stage" / "scores", scoring.token_logps, 0, False)


@pytest.mark.parametrize("most", [40, 10])
def test_a_batch_too_large_to_score_is_scored_in_halves(tmp_path, monkeypatch, most):
    model_of("Llama").save_pretrained(tmp_path)
    groups = [group for group in ragged() if all(group.answers)]
    share = tmp_path, groups, tmp_path / "stage" / "scores", scoring.token_logps, 0, False
    whole = by_group(scoring.score_share(AUTO, *share))
    hidden_states, sizes = scoring.hidden_states, []

    def short(model, batch):
        sizes.append(batch.input_ids.numel())
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("too much")
        return hidden_states(model, batch)

    monkeypatch.setattr(scoring, "hidden_states", short)
    if most == 10:
        with pytest.raises(InputError, match="stage/scores: out of memory with one prompt; expected a lower max_len"):
            scoring.score_share(AUTO, *share)
        return
    actual = by_group(scoring.score_share(AUTO, *share))
    assert max(sizes) > most
    assert actual.keys() == whole.keys()
    for i in whole:
        for one, other in zip(actual[i], whole[i], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
