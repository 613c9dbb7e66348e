"""The policy in training computes what the policy that sampled computes: first rewards are 0, and noise is refused."""

import copy
import json
import random

import numpy as np
import peft
import pytest
import torch
import transformers

from irlfast.common.files import InputError
from irlfast.data.packing import pack
from irlfast.models.checks import SEPARATE
from irlfast.models.forward import hidden_states
from irlfast.models.steady import check_steady, recompute_layers
from tests.data.test_packing import model_of, ragged
from tests.helpers.runs import run

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
NOISY = {
    "OPT": transformers.OPTConfig(
        **SIZE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5
    ),
    "GPT-2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    ),
    "Mixtral": transformers.MixtralConfig(
        **SIZE, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.9
    ),
    "BART": transformers.BartConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, decoder_layerdrop=0.5, init_std=0.3
    ),
}
ONE_STEP = {"stages": 1, "inner_steps": 1, "sft_steps": "null", "logging_steps": 1, "max_train_samples": 16}
RUNS = [
    ("OPT", {"gradient_checkpointing": "true", "zero_stage": 2}),
    ("GPT-2", {"use_peft": "true", "lora_r": 4, "gradient_checkpointing": "selective"}),
    ("Mixtral", {}),
]


@pytest.mark.parametrize("name, keys", RUNS, ids=str)
def test_a_stages_first_rewards_are_exactly_zero(tmp_path, name, keys):
    NOISY[name].to_json_file(tmp_path / "config.json", use_diff=False)
    run(tmp_path / "run", config_name=tmp_path / "config.json", **ONE_STEP | keys)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "rewards/margins" in row)
    assert [first[f"rewards/{what}"] for what in ("chosen", "rejected", "margins")] == [0, 0, 0]


def noisy(name: str, heads: int = 0):
    """Return a model with much randomness in ``train()``, and an adapter with dropout that changes the outputs."""
    torch.manual_seed(0)
    config = copy.deepcopy(NOISY[name])
    config.vocab_size, config.num_labels = 61, heads
    kind = transformers.AutoModelForSequenceClassification if heads else transformers.AutoModelForCausalLM
    settings = peft.LoraConfig(target_modules=["q_proj", "c_attn"], lora_dropout=0.5, init_lora_weights=False)
    return peft.get_peft_model(kind.from_config(config), settings, autocast_adapter_dtype=False)


@pytest.mark.parametrize("recomputed", [None, False, True], ids=["kept", "recomputed", "recomputed but for products"])
@pytest.mark.parametrize("name, heads", [*((name, 0) for name in NOISY), ("GPT-2", 1), ("Mixtral", 2)])
def test_hidden_states_and_gradients_in_training_are_those_of_the_policy_that_sampled(name, heads, recomputed):
    model, batch = noisy(name, heads).eval(), pack(ragged(), SEPARATE)
    with torch.no_grad():
        expected = hidden_states(model, batch)
    gradients = []
    for way in {None, recomputed}:
        if way is not None:
            recompute_layers(model, selective=way)
        model.zero_grad()
        hidden = hidden_states(model, batch)
        hidden.square().mean().backward()
        assert torch.equal(hidden, expected)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    check_steady(model, batch)
    for one, other in zip(gradients[0], gradients[-1], strict=True):
        torch.testing.assert_close(one, other)


def test_these_models_are_random_in_train_mode():
    """Without this, the tests above would prove nothing."""
    for name in NOISY:
        model, batch = noisy(name).train(), pack(ragged(), SEPARATE)
        assert not torch.equal(hidden_states(model, batch), hidden_states(model, batch))
        with pytest.raises(InputError, match="draws random numbers"):
            check_steady(model, batch)


def changed(change) -> torch.nn.Module:
    """Return a Llama whose second MLP's output is changed."""
    model = model_of("Llama")
    mlp = model.model.layers[1].mlp
    usual = mlp.forward
    mlp.forward = lambda x: change(usual(x))
    return model


NOISES = {
    "torch": lambda x: x + 1e-5 * torch.randn_like(x),
    "torch's dropout": lambda x: torch.nn.functional.dropout(x, 0.1, training=True),
    "Python": lambda x: x * random.choice([1.0, 1.1, 1.2, 1.3, 1.4]),
    "NumPy": lambda x: x * float(np.random.uniform(1, 2)),
}


@pytest.mark.parametrize("noise", NOISES)
def test_noise_in_eval_mode_is_refused_and_the_module_is_named(noise):
    model = changed(NOISES[noise])
    expected = r"LlamaForCausalLM: its module model\.layers\.1\.mlp \(LlamaMLP\) draws random numbers in eval\(\)"
    random.seed(1)
    with pytest.raises(InputError, match=expected):
        check_steady(model, pack(ragged()))


def test_a_forward_pass_that_depends_on_gradients_is_refused_and_the_module_is_named():
    model = changed(lambda x: x * (1 + x.requires_grad))
    with pytest.raises(InputError, match=r"its module model\.layers\.1\.mlp \(LlamaMLP\) gives another result"):
        check_steady(model, pack(ragged()))


def test_layers_that_cannot_be_recomputed_are_refused_in_one_sentence():
    with pytest.raises(InputError, match="gradient_checkpointing: Linear has no layers for it; expected false"):
        recompute_layers(torch.nn.Linear(2, 2), selective=False)
