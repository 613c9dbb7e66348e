"""Sampling by the real vLLM, compared with Transformers on tiny fp32 models."""

import collections

import pytest
import torch
from transformers import GenerationConfig

from irlfast.sampling.mismatch import measure_mismatch
from irlfast.sampling.shards import DRAWN
from tests.helpers.shards import LONGEST, shard
from tests.helpers.tiers import full
from tests.helpers.vllm_cases import (
    PROMPTS,
    VLLM_PYTHON,
    VOCABULARY,
    answers,
    drawn_by,
    needs_vllm,
    perturbed_lora,
    tiny,
)


def greedy(model, prompt: list[int], end_id: int | None) -> list[int]:
    model.generation_config = GenerationConfig()  # without the checkpoint's defaults
    options = GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=end_id, pad_token_id=0)
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=options
    )  # token 0 is not padding
    return generated[0, len(prompt) :].tolist()


def logps_of(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Transformers' log-probability of each token of an answer."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@full
@needs_vllm
@pytest.mark.parametrize(("architecture", "lora"), [("llama", False), ("gpt_neox", True)])
def test_greedy_answers_are_those_of_transformers(architecture, lora, tmp_path):
    """They agree token for token, the end token included. The checkpoint's own end tokens do not end an answer."""
    model, policy = tiny(architecture), tmp_path / "model"
    model.save_pretrained(policy)
    if lora:
        before = greedy(model, PROMPTS[0], None)
        model = perturbed_lora(model, rank=12)
        assert greedy(model, PROMPTS[0], None) != before
    full = [greedy(model, prompt, None) for prompt in PROMPTS]
    counts = collections.Counter(token for answer in full for token in set(answer))
    # The end token occurs in about half of the answers. The checkpoint names another end token, which occurs in many.
    by_use = sorted(counts, key=lambda token: (abs(counts[token] - len(full) // 2), token))
    end_id, named = by_use[:2]
    expected = [greedy(model, prompt, end_id) for prompt in PROMPTS]
    stopped = [answer[-1] == end_id for answer in expected]
    assert any(stopped) and not all(stopped) and any(named in answer[:-1] for answer in expected)
    assert all((len(answer) == LONGEST) or stop for answer, stop in zip(expected, stopped, strict=True))

    model.config.eos_token_id = model.generation_config.eos_token_id = named
    model.config.save_pretrained(policy)
    model.generation_config.save_pretrained(policy)
    if lora:
        model.peft_config["default"].base_model_name_or_path = str(policy)
        policy = tmp_path / "adapter"
        model.save_pretrained(policy)
    shards = [shard(0, *PROMPTS[:4], ends=[end_id]), shard(1, *PROMPTS[4:], ends=[end_id])]
    by_shard = answers(policy, *shards, python=VLLM_PYTHON)
    assert by_shard[0] + by_shard[1] == expected


@full
@needs_vllm
def test_sampled_answers_depend_on_prompts_and_seed_and_have_the_policys_distribution(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        chances = [torch.softmax(model(torch.tensor([p])).logits[0, -1].double(), -1) for p in PROMPTS]
    spread = max(range(len(PROMPTS)), key=lambda i: torch.special.entr(chances[i]).sum())
    draws, likely = 2000, int(chances[spread].argmax())
    chances[spread][likely] = 0
    chances[spread] /= chances[spread].sum()
    how = {"how": DRAWN, "max_new_tokens": 6}
    drawn = drawn_by(
        tmp_path,
        shard(0, *PROMPTS, seed=5, **how),
        shard(1, PROMPTS[spread], seed=100, n=draws, **how),
        shard(2, *PROMPTS[::-1], seed=5, **how),
        shard(3, *PROMPTS, seed=50, **how),
        shard(5, *PROMPTS, seed=5, how=DRAWN._replace(logps=True), max_new_tokens=6),
        shard(
            4, *[[5] * 37] * 400, seed=5000, **how
        ),  # more tokens than one step of vLLM takes; its limit falls inside a prompt
        python=VLLM_PYTHON,
        never=[likely],
    )
    by_shard = {number: [each.ids for each in group] for number, group in drawn.items()}
    trainer = [logps_of(model, prompt, ids) for prompt, ids in zip(PROMPTS, by_shard[5], strict=True)]
    found = measure_mismatch(trainer, [torch.tensor(each.logps) for each in drawn[5]], "vLLM in fp32")
    assert 0 < found["sampling/sampling_logp_difference/max"] < 1e-4  # the ids in `never` have their share in both
    assert found["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)
    assert not any(each.logps for each in drawn[0])
    assert len(by_shard[4]) == 400
    assert not any(likely in answer for shard in by_shard.values() for answer in shard)
    assert by_shard[5] == by_shard[0]  # whatever was sampled beside them
    few = [shard(0, *PROMPTS, seed=5, **how), shard(3, *PROMPTS, seed=50, **how)]
    alone = answers(tmp_path, *few, python=VLLM_PYTHON, never=[likely], at_once=len(PROMPTS))
    assert (alone[0], alone[3]) == (by_shard[0], by_shard[3])
    assert by_shard[2] != by_shard[0][::-1]  # the same prompts with other seeds
    assert sum(a != b for a, b in zip(by_shard[0], by_shard[3], strict=True)) > len(PROMPTS) // 2
    assert all(len(answer) == 6 or answer[-1] == 2 for shard in by_shard.values() for answer in shard)
    assert all(2 not in answer[:-1] for shard in by_shard.values() for answer in shard)

    # Pearson's chi-squared of the first token against Transformers' softmax, rare tokens pooled.
    expected = chances[spread] * draws
    observed = torch.bincount(torch.tensor([answer[0] for answer in by_shard[1]]), minlength=VOCABULARY).double()
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    freedom = len(expected) - 1
    assert freedom >= 3
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5
