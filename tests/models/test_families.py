"""Families of models: a step at rate 0 leaves every tensor, the config and the logits as they were, or is refused."""

import pytest

from tests.helpers.families import ALL
from tests.helpers.runs import printed

ODD = (  # persistent buffers, shared experts, tied weights, offsets of positions, slopes, no attention, float32 routers
    *("deepseek_v3", "gemma3n_text", "gemma4_text", "gpt_oss", "mixtral", "opt", "falcon", "bloom", "mamba"),
    *("qwen3_moe", "phi", "ernie4_5_moe", "nemotron_h"),
)
WAYS = {  # keys of the run, and families that it does not take: PEFT no Mamba, DeepSpeed no float32 beside bfloat16
    (): (),
    ("use_peft=true",): ("mamba", "nemotron_h"),
    ("zero_stage=2", "dtype=bfloat16"): ("mamba", "ernie4_5_moe"),
    ("zero_stage=3",): (),
}


def outcomes(*arguments: str) -> dict[str, tuple[str, str]]:
    """What became of each family, and why."""
    out, _ = printed(["-m", "tests.helpers.families", *arguments])
    lines = (line for line in out.splitlines()[:-1])
    return {line[:28].strip(): (line[28:40].strip(), line[40:]) for line in lines}


@pytest.mark.parametrize("keys", WAYS, ids=" ".join)
def test_families_with_something_odd_are_kept_whole(keys):
    names = [name for name in ODD if name not in WAYS[keys]]
    assert outcomes(*names, *keys) == dict.fromkeys(names, ("right", ""))


def test_float32_parameters_that_deepspeed_would_round_are_refused():
    [(found, why)] = outcomes("ernie4_5_moe", "dtype=bfloat16", "zero_stage=2").values()
    assert found == "refused" and "keeps model.layers.1.mlp.gate.weight in float32 beside bfloat16" in why


@pytest.mark.slow
def test_every_family_is_kept_whole_or_refused_with_a_reason():
    found = outcomes()
    assert found.keys() == set(ALL)
    assert not [name for name, (what, why) in found.items() if what == "wrong" or (what == "refused" and not why)]
    assert sum(what == "right" for what, _ in found.values()) > 140
