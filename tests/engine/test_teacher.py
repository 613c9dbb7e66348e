"""The teacher beside a policy in training: its weights, its memory, and its prompts."""

import json

import pytest
import torch

from irlfast.data.packing import PromptGroup, count_tokens, pack
from irlfast.engine.module import Policy
from irlfast.engine.teacher import TeacherModel, teach
from irlfast.losses.inputs import Normalisers
from irlfast.models.forward import hidden_states
from tests.data.test_packing import model_of
from tests.helpers.prepared import prepared
from tests.helpers.runs import printed
from tests.helpers.tiers import full, slow

ENGINES = ("ZeRO 0", "ZeRO 2", "ZeRO 1 in bf16", "LoRA in bf16")
CASES = [f"{kind}, {engine}" for kind in ("frozen", "averaged", "every second step", "live") for engine in ENGINES]


@pytest.mark.parametrize(
    ("cases", "processes"),
    [(["averaged, LoRA in bf16"], 1), pytest.param(CASES, 1, marks=slow), pytest.param(CASES, 2, marks=full)],
)
def test_a_teacher_is_frozen_or_follows_the_policy_and_resumes_with_the_same_weights(tmp_path, cases, processes):
    out, _ = printed(["-m", "tests.helpers.teacher_steps", str(tmp_path), *cases], processes)
    results = json.loads(out.splitlines()[-1])
    assert [*results] == cases
    for case, row in results.items():
        assert row["gap"] < 1e-6 < 1e-2 < row["moved"], case
        assert row["same on all"] and row["resumed"], case
        assert row["base shared"], case
        assert row["trained shared"] == case.startswith("live"), case


def test_a_teacher_reads_its_own_prompts_and_the_same_answers_with_the_same_hidden_states_as_alone():
    model = model_of("Llama")
    groups = [
        PromptGroup([3, 4], ([5, 6, 7, 2], [8, 2]), teacher_prompt=[9, 3, 4, 9]),
        PromptGroup([4], ([6, 2], [7, 8, 9, 2]), teacher_prompt=[9, 4, 5, 9, 9]),
    ]
    batch = pack(groups)
    taught = teach(TeacherModel(prepared(model), {}), batch)
    assert torch.equal(batch.teacher.targets, batch.targets) and torch.equal(batch.teacher.cu_seqlens, batch.cu_seqlens)
    assert not taught.hidden.requires_grad and not taught.head.weight.requires_grad
    alone = [PromptGroup(group.teacher_prompt, (answer,)) for group in groups for answer in group.answers]
    expected = [hidden_states(model, pack([each]))[pack([each]).rows] for each in alone]
    torch.testing.assert_close(taught.hidden[taught.rows], torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_loss_gets_a_teacher_only_in_a_phase_that_has_one():
    model, groups = model_of("Llama"), [PromptGroup([3, 4], ([5, 2],))]
    given = []

    def loss(hidden, head, batch, normalisers, **taught):
        given.append(taught)
        return hidden.sum(), {}

    for teacher in (None, TeacherModel(prepared(model), {})):
        Policy(prepared(model), loss, teacher=teacher)(pack(groups), Normalisers(1, 2))
    assert given[0] == {} and given[1]["teacher"].rows.tolist() == [1, 2]


def test_a_batch_that_scores_nothing_has_a_teacher_that_scores_nothing():
    batch = pack([PromptGroup([3, 4], ([5, 2],), teacher_prompt=[3, 4, 5])]).unscored()
    assert len(batch.targets) == len(batch.teacher.rows) == 0


def test_a_group_is_as_long_as_the_longer_of_its_two_prompts_makes_it():
    answers = ([5, 6, 2], [7, 2])
    assert count_tokens(PromptGroup([3], answers, teacher_prompt=[3] * 9)) == 9 + 2 + 1
    assert count_tokens(PromptGroup([3] * 9, answers, teacher_prompt=[3])) == 9 + 2 + 1
