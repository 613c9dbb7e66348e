"""The reference of RFT (arXiv 2405.17888, eq. 1): the optimum of each choice, and the policy that a run scores."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.exact import ANSWERS, answer_logps, model
from tests.helpers.runs import run
from tests.helpers.tiers import full
from tests.methods.test_exact_rft import BETA, PROMPT, aligned_loss, groups_of

EXPERT, INITIAL, OTHER = model(1), model(2), model(3)


def distance_to_optimum(policy, worse, reference, scale: float = 1.0) -> float:
    """APA's loss of ``policy`` on all answers, which is 0 only at π_ref·exp(r/β).

    The reward is the optimum of Bradley–Terry on (expert, ``worse``), log π_E/π_worse, times β and ``scale``. Another
    policy sampled the answers.
    """
    reward = scale * BETA * (answer_logps(EXPERT, PROMPT) - answer_logps(worse, PROMPT)).detach()
    group = groups_of(OTHER, reference, [tuple(range(len(ANSWERS)))], reward, "apa", "reward")
    return aligned_loss(policy, group, "apa", "reward").item()


def test_the_expert_is_the_optimum_where_the_worse_answers_are_the_references():
    """In a later stage too: ``reference: stage`` with ``policy_demo``, or ``initial`` with ``sft_demo``."""
    assert distance_to_optimum(EXPERT, worse=INITIAL, reference=INITIAL) == pytest.approx(0, abs=1e-9)
    assert distance_to_optimum(EXPERT, worse=EXPERT, reference=EXPERT) == pytest.approx(0, abs=1e-9)
    assert distance_to_optimum(INITIAL, worse=INITIAL, reference=INITIAL) > 0.1


def test_a_fixed_reference_takes_an_expert_policy_back_where_the_reward_is_learned_from_its_own_answers():
    """``reference: initial`` with ``policy_demo``: once π = π_E, the reward is 0 and the optimum is π_ref."""
    assert distance_to_optimum(EXPERT, worse=EXPERT, reference=INITIAL) > 0.1
    assert distance_to_optimum(INITIAL, worse=EXPERT, reference=INITIAL) == pytest.approx(0, abs=1e-9)


def test_a_lower_beta_than_the_rewards_own_scale_overshoots_the_expert():
    """β = 0.1 for a Bradley–Terry reward: the optimum is π_ref·(π_E/π_ref)^10."""
    assert distance_to_optimum(EXPERT, worse=INITIAL, reference=INITIAL, scale=10) > 1


@full
def test_the_first_policy_is_the_reference_of_a_later_stage(tmp_path):
    output = tmp_path / "run"
    run(output, method="rft", stages=2, num_generations=2, reward_data="sft_demo", reference="initial")
    rows = [json.loads(line) for path in (output / "stage-01" / "rollouts").glob("*.jsonl") for line in path.open()]
    rows.sort(key=lambda row: row["index"])
    scored = load_file(output / "stage-01" / "reference.safetensors")["values"]
    lengths = [len(row["answer_ids"]) for row in rows]
    assert len(scored) == sum(lengths)
    policy = output / "sft" / "policy"
    reference = AutoModelForCausalLM.from_pretrained(policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    for row, found in zip(rows[:4], scored.split(lengths)[:4], strict=True):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + row["answer_ids"]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(row["answer_ids"])[:, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
