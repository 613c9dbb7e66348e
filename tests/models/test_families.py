"""Model families: a step at learning rate 0 keeps every tensor, the config and the logits, or the model is refused."""

import pytest

from tests.helpers.families import ALL
from tests.helpers.runs import printed
from tests.helpers.tiers import first_then_full, full

# With persistent buffers, shared experts, tied weights, position offsets, ALiBi, no attention, or float32 routers.
ODD = (
    *("deepseek_v3", "gemma3n_text", "gemma4_text", "gpt_oss", "mixtral", "opt", "falcon", "bloom", "mamba"),
    *("qwen3_moe", "phi", "ernie4_5_moe", "nemotron_h"),
)
# Keys of a run, and the families that it refuses: PEFT cannot adapt Mamba, DeepSpeed rounds float32 beside bfloat16.
RUNS = {
    (): (),
    ("use_peft=true",): ("mamba", "nemotron_h"),
    ("zero_stage=2", "dtype=bfloat16"): ("mamba", "ernie4_5_moe"),
    ("zero_stage=3",): (),
}


def outcomes(*arguments: str) -> dict[str, tuple[str, str]]:
    """Return for each family whether it came out right, wrong or refused, and why."""
    out, _ = printed(["-m", "tests.helpers.families", *arguments])
    lines = (line for line in out.splitlines()[:-1])
    return {line[:28].strip(): (line[28:40].strip(), line[40:]) for line in lines}


@pytest.mark.parametrize("keys", first_then_full(RUNS, others=1), ids=" ".join)
def test_unusual_families_are_kept_to_the_bit(keys):
    names = [name for name in ODD if name not in RUNS[keys]]
    assert outcomes(*names, *keys) == dict.fromkeys(names, ("right", ""))


@full
def test_float32_parameters_that_deepspeed_would_round_are_refused():
    [(outcome, why)] = outcomes("ernie4_5_moe", "dtype=bfloat16", "zero_stage=2").values()
    assert outcome == "refused" and "keeps model.layers.1.mlp.gate.weight in float32 beside bfloat16" in why


@pytest.mark.slow
def test_every_family_is_kept_to_the_bit_or_refused_with_a_reason():
    every = outcomes()
    assert every.keys() == set(ALL)
    assert not [name for name, (outcome, why) in every.items() if outcome == "wrong"]
    assert not [name for name, (outcome, why) in every.items() if outcome == "refused" and not why]
    assert sum(outcome == "right" for outcome, _ in every.values()) > 140
