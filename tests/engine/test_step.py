"""A step and its meters: the operations that are counted, and the places where it waits for the device."""

import json
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from deepspeed.comm import comm

from irlfast import ops
from irlfast.common import dist
from irlfast.config.methods import SFT_TEACHERS
from irlfast.data.packing import Layout, PromptGroup, pack, token_counts
from irlfast.engine.deepspeed_patches import timed_collectives
from irlfast.engine.memory import TokenLimit
from irlfast.engine.meters import Stopwatch
from irlfast.engine.step import prepare_step, prepare_steps
from irlfast.losses.distillation import distillation_loss
from irlfast.losses.inputs import Teacher
from irlfast.losses.pairs import irft_loss, t_spin_loss
from irlfast.losses.policy import align_loss
from irlfast.losses.reasoning import THOUGHT_REWARDS, reasoning_loss
from irlfast.losses.rewards import reward_loss
from irlfast.losses.sft import SFT_LOSSES, sft_loss
from irlfast.models.forward import hidden_states
from irlfast.reports.files import PARTS
from tests.data.test_packing import VOCABULARY, model_of, ragged
from tests.helpers.runs import printed, run
from tests.helpers.tiers import slow


def test_attended_tokens_are_those_that_the_mask_shows():
    groups = [group for group in ragged() if all(group.answers)]
    attended = 0
    for group in groups:
        for k, answer in enumerate([group.prompt, *(answer[:-1] for answer in group.answers)]):
            attended += sum(range(1, len(answer) + 1)) + (len(answer) * len(group.prompt) if k else 0)
    assert token_counts(groups, Layout())["attended"] == attended
    assert token_counts([], Layout()) == Counter()


ALIGN = {"answers": 2, "beta": 0.1, "kl_in_loss": True, "clip_range": 0.2}
REWARD = {"level": "sequence", "alpha": 0.5, "regularization": 0.1}
LOSSES = {
    "sft": partial(sft_loss, remaining=True),
    **{f"sft, {name}": partial(sft_loss, loss_type=name) for name in SFT_LOSSES},
    "irft": partial(irft_loss, beta=0.1, loss_type="sigmoid", nll_weight=0.1),
    **{align: partial(align_loss, align=align, **ALIGN) for align in ("rloo", "ppo", "apa")},
    **{kind: partial(reward_loss, kind=kind, **REWARD) for kind in ("linear", "gail", "bradley_terry")},
    **{
        f"{kind}, tokens": partial(reward_loss, kind=kind, **REWARD | {"level": "token"})
        for kind in ("bce", "airl", "gail", "alpha")
    },
}
# The answers of a prompt group in each of the losses; 2 where it is not said.
ANSWERS = {"t_spin": 3, "distillation": 1, **{name: 1 for name in LOSSES if name.startswith("sft")}}
DISTILLATION = {"mode": "full_logits", "alpha": 1.0, "top_k": 5}
ALL_LOSSES = LOSSES | {
    "gaussian": partial(reward_loss, kind="gaussian", **REWARD),
    "t_spin": partial(t_spin_loss, beta=0.1, historical_weight=0.5, loss_type="sigmoid"),
    "distillation": partial(distillation_loss, **DISTILLATION),
    **{f"reasoning, {name}": partial(reasoning_loss, reward=name, thoughts=2) for name in THOUGHT_REWARDS},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_process_without_prompt_groups_adds_nothing_to_loss_and_gradients(name, monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "rank", lambda: 1)
    model, heads = model_of("Llama"), torch.nn.Linear(32, 2)
    logps = torch.full((4,), -1.0)
    groups = [PromptGroup([1, 2], ([3] * 4, [4] * 4), (logps, logps), (logps, logps), (logps, -logps))]
    [prepared] = prepare_steps([np.array([0])], groups, Layout(), TokenLimit(8, auto=False))
    [batch] = prepared.batches
    head = ops.Head(heads.weight, heads.bias, 1.0, None) if LOSSES[name].func is reward_loss else ops.lm_head(model)
    hidden = hidden_states(model, batch)
    has_teacher = LOSSES[name].keywords.get("loss_type") in SFT_TEACHERS
    taught = {"teacher": Teacher(hidden.detach(), head, batch.rows)} if has_teacher else {}
    loss, metrics = LOSSES[name](hidden, head, batch, prepared.normalisers, **taught)
    loss.backward()
    assert loss == 0 and all(value == 0 for value in metrics.values())
    trained = [parameter.grad for parameter in model.base_model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in trained)


def drawn_groups(draw: random.Random, answers: int) -> list[PromptGroup]:
    """Up to 9 prompts with answers of 1 to 9 tokens, and all values per token that a loss may take."""

    def values(lengths: list[int]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor([draw.uniform(-2, 0) for _ in range(length)]) for length in lengths)

    groups = []
    for _ in range(draw.randint(1, 9)):
        lengths = [draw.randint(1, 9) for _ in range(answers)]
        prompt, *each = ([draw.randrange(VOCABULARY) for _ in range(n)] for n in (draw.randint(1, 9), *lengths))
        known, whole = [values(lengths) for _ in range(2)], values([1] * answers)
        advantages = tuple(value.expand(length) for value, length in zip(whole, lengths, strict=True))
        thoughts = tuple(draw.randrange(length) for length in lengths)
        weights = values(lengths)
        groups.append(PromptGroup(prompt, tuple(each), *known, advantages, weights, thoughts))
    return groups


def loss_and_gradients(
    name: str, groups: list[PromptGroup], layout: Layout, limit: int, ranks: int, monkeypatch
) -> tuple[torch.Tensor, ...]:
    """The loss of a step that takes all groups, and its gradients: the means over the ranks."""
    model, other = model_of("Llama").double(), model_of("Qwen2").double()
    torch.manual_seed(0)
    heads = torch.nn.Linear(32, 4).double()
    is_reward, total = ALL_LOSSES[name].func is reward_loss, torch.zeros((), dtype=torch.float64)
    head = ops.Head(heads.weight, heads.bias, 1.0, None) if is_reward else ops.lm_head(model)
    has_teacher = name == "distillation" or ALL_LOSSES[name].keywords.get("loss_type") in SFT_TEACHERS
    monkeypatch.setattr(dist, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        prepared = prepare_step(np.arange(len(groups)), groups, layout, limit)
        for batch in prepared.batches:
            taught = Teacher(hidden_states(other, batch).detach(), ops.lm_head(other), batch.rows)
            keywords = {"teacher": taught} if has_teacher else {}
            loss, _ = ALL_LOSSES[name](hidden_states(model, batch), head, batch, prepared.normalisers, **keywords)
            (loss / ranks).backward()
            total += loss.detach() / ranks
    trained = [*model.named_parameters(), *heads.named_parameters()]
    return total, *(parameter.grad for _, parameter in trained if parameter.grad is not None)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=slow) for seed in range(1, 9))])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_steps_loss_and_gradients_are_the_same_however_its_groups_are_packed_and_shared_out(name, seed, monkeypatch):
    """Drawn groups, drawn limits of tokens, and drawn numbers of ranks, also more than there are groups."""
    draw = random.Random(f"{name} {seed}")
    groups = drawn_groups(draw, ANSWERS.get(name, 2))
    layouts = [Layout(keep_last_token=ALL_LOSSES[name].func is reward_loss, one_row=row) for row in (False, True)]
    expected = loss_and_gradients(name, groups, layouts[0], 10**6, 1, monkeypatch)
    for _ in range(3):
        how = draw.choice(layouts), draw.randint(10, 120), draw.randint(1, 4)
        actual = loss_and_gradients(name, groups, *how, monkeypatch)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7, msg=lambda text, how=how: f"{how}: {text}")


def test_meters_divide_the_time_of_a_step_and_a_profile_is_written(tmp_path):
    run(tmp_path / "run", profile="true", stages=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        parts = [row[f"time/{part}"] for part in PARTS]
        assert sum(parts) == pytest.approx(1)
        assert min(parts) >= 0
        assert 0 < row["answer_tokens_per_second"] < row["tokens_per_second"]
        assert row["tflops"] > 0
    trace = json.loads((tmp_path / "run" / "sft" / "trace.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_time_in_collectives_is_taken_from_the_part_that_calls_them(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 5.0, 7.0, 8.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(Stopwatch, "now", lambda _: next(clock))

    class Backend:
        def __getattr__(self, name):
            return lambda *arguments: (name, *arguments)

    monkeypatch.setattr(comm, "cdb", Backend())
    watch = Stopwatch()
    with timed_collectives(watch):
        watch.lap("data")  # at 1
        assert comm.cdb.all_reduce(3) == ("all_reduce", 3)  # from 2 to 5
        assert comm.cdb.broadcast(4) == ("broadcast", 4)  # from 7 to 8
        watch.lap("backward")  # at 10
        watch.lap("optimizer")  # at 20
    assert not vars(comm.cdb)
    parts = {"data": 2.0, "backward": 5.0, "optimizer": 10.0, "communication": 4.0, "checkpoint": 0.0}
    assert watch.read() == parts | {"all": 21.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
def test_a_batch_goes_to_the_gpu_without_waiting():
    batch = pack([PromptGroup([1] * 9, ([2] * 5, [3] * 5))]).pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to(torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.is_cuda for value in moved if isinstance(value, torch.Tensor))


def test_a_step_waits_for_the_device_at_known_places_only_and_reduces_gradients_once(tmp_path):
    out, _ = printed(["-m", "tests.helpers.waits", str(tmp_path)])
    alone, *zero = (json.loads(out.splitlines()[-1])[stage] for stage in "012")
    batches = alone["batches"]
    assert batches > 1
    known = {
        "slab.py:plan": batches,  # the answers' lengths: the only wait of the loss
        "slab.py:add_gradients": batches,  # is any gradient of a slab not zero? Checked on a CPU only
        "custom_op.py:scaled": 2 * batches,  # is a gradient multiplied by 1? Checked on a CPU only
    }
    known["step.py:train_step"] = 1  # is the gradient's norm finite?
    assert alone["places"] == known
    assert alone["operations"] == 3 * batches + 1  # those of the last three: no other operation waits
    for row in zero:
        assert row["places"] == known | {"utils.py:is_invalid_grad_norm": 2}  # DeepSpeed checks the norm, too
        assert row["operations"] <= 3 * batches + 3 + 1  # and copies one value from the CPU
    assert alone["collectives"] == 0
    assert [row["collectives"] for row in zero] == [2, 2]  # one for the gradients, one for the norm
