"""lm_head and score_head give what the model's logits show, for each family whose logits are more than one product."""

import pytest
import torch
import transformers
from torch.nn.functional import linear

from irlfast import ops
from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.packing import pack
from irlfast.losses.inputs import arguments
from irlfast.models.forward import hidden_states
from irlfast.models.prepare import prepare_model
from irlfast.ops.common.heads import score_head
from tests.data.test_packing import SHAPE, ragged

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
OPT = {"vocab_size": 61, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
LAYERED = SHAPE | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
GEMMA4 = LAYERED | {
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 61,
    "num_kv_shared_layers": 0,
}
LLAMA4 = {"text_config": SHAPE, "vision_config": VISION}
# The config of each family, and the scale and soft-cap that its logits should have.
FAMILIES = {
    "Llama": ("LlamaConfig", SHAPE, 1.0, None),
    "Cohere": ("CohereConfig", SHAPE | {"logit_scale": 0.3}, 0.3, None),
    "Cohere2": ("Cohere2Config", SHAPE | {"logit_scale": 1.7, "sliding_window": 32}, 1.7, None),
    "Granite": ("GraniteConfig", SHAPE | {"logits_scaling": 3.0}, 1 / 3, None),
    "GraniteMoe": ("GraniteMoeConfig", SHAPE | MOE | {"logits_scaling": 8.0}, 0.125, None),
    "HyperCLOVA X": ("HyperCLOVAXConfig", SHAPE | {"logits_scaling": 0.7}, 0.7, None),
    "MiniCPM3": ("MiniCPM3Config", SHAPE | MLA | {"num_key_value_heads": 4, "dim_model_base": 8}, 0.25, None),
    "Falcon-H1": ("FalconH1Config", SHAPE | MAMBA | {"lm_head_multiplier": 0.4}, 0.4, None),
    "Gemma 2": ("Gemma2Config", SHAPE | {"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "Gemma 3": ("Gemma3TextConfig", LAYERED | {"final_logit_softcapping": 5.0}, 1.0, 5.0),
    "Gemma 4, text": ("Gemma4TextConfig", GEMMA4 | {"final_logit_softcapping": 7.0}, 1.0, 7.0),
    "Gemma 4, composite": (
        "Gemma4Config",
        {"text_config": GEMMA4 | {"final_logit_softcapping": 7.0}, "vision_config": VISION, "audio_config": None},
        1.0,
        7.0,
    ),
    "VaultGemma": ("VaultGemmaConfig", SHAPE | {"final_logit_softcapping": 4.0}, 1.0, 4.0),
    "RecurrentGemma": ("RecurrentGemmaConfig", SHAPE | {"logits_soft_cap": 6.0, "lru_width": 32}, 1.0, 6.0),
    "xLSTM": (
        "xLSTMConfig",
        {
            "vocab_size": 61,
            "hidden_size": 32,
            "num_heads": 4,
            "num_hidden_layers": 2,
            "qk_dim_factor": 1.0,
            "output_logit_soft_cap": 2.0,
        },
        1.0,
        2.0,
    ),
    "nanochat": ("NanoChatConfig", SHAPE | {"final_logit_softcapping": 2.5}, 1.0, 2.5),
    "GPT-J, bias": ("GPTJConfig", GPT, 1.0, None),
    "CodeGen, bias": ("CodeGenConfig", GPT, 1.0, None),
    "Phi, bias": ("PhiConfig", SHAPE, 1.0, None),
    "OPT": ("OPTConfig", OPT | {"hidden_size": 32, "word_embed_proj_dim": 32}, 1.0, None),
    "OPT, projected": ("OPTConfig", OPT | {"hidden_size": 32, "word_embed_proj_dim": 16}, 1.0, None),
    "Mamba, casts": ("MambaConfig", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}, 1.0, None),
}


def model_of(name: str) -> torch.nn.Module:
    """A tiny model. The weights of its head are so large that a scale or soft-cap matters; its biases are not zero."""
    kind, keys, *_ = FAMILIES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this Transformers has no {kind}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**keys)).float().eval()
    output = model.get_output_embeddings()
    with torch.no_grad():
        output.weight.normal_()
        if output.bias is not None:
            output.bias.normal_()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_by_the_head_match_the_models_own_logits(name):
    model = model_of(name)
    ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    expected = logits.flatten(0, 1).log_softmax(-1).gather(1, ids.view(-1, 1)).squeeze(1)
    head = ops.lm_head(model)
    actual = ops.log_ratio(hidden, targets=ids.flatten(), cu_seqlens=torch.tensor([0, 24]).int(), **head._asdict())
    torch.testing.assert_close(actual.token_logps, expected, rtol=1e-5, atol=1e-4)
    plain = linear(hidden, head.weight, head.bias)
    assert name in ("Llama", "OPT", "OPT, projected", "Mamba, casts") or plain.std() > 0.5 * (head.logit_softcap or 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_scale_and_soft_cap_are_exact_in_every_dtype(name, dtype):
    *_, scale, cap = FAMILIES[name]
    head = ops.lm_head(model_of(name).to(dtype))
    assert head.logit_scale == pytest.approx(scale, rel=1e-7)
    assert head.logit_softcap == (cap and pytest.approx(cap, rel=1e-7))


def test_a_probe_reads_no_weights():
    """The probe then works while ZeRO-3 has the weights in parts, and costs little."""
    model = model_of("Gemma 2")
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    assert ops.lm_head(model)[2:] == (1.0, 3.0)


def test_a_probe_leaves_the_model_as_it_was():
    model = model_of("Gemma 2")
    ids = torch.arange(12)[None]
    before, attributes = model(input_ids=ids).logits, [sorted(vars(module)) for module in model.modules()]
    ops.lm_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


def changed(before=None, after=None, **keys) -> torch.nn.Module:
    """A Llama whose LM head is given ``before(hidden)``, and whose logits are ``after(logits)``."""

    class Changed(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = after(self, output.logits) if after else output.logits
            return output

    torch.manual_seed(0)
    model = Changed(transformers.LlamaConfig(**SHAPE | keys)).eval()
    model.gain = torch.nn.Parameter(torch.ones(()))
    if before:
        model.lm_head.register_forward_pre_hook(lambda module, given: (before(given[0]),))
    return model


MASKED = torch.zeros(61).index_fill(0, torch.tensor([3]), -1e9)
OTHERS = {
    "normed before the head": changed(before=lambda x: x / x.norm(dim=-1, keepdim=True)),
    "soft-capped before the head": changed(before=lambda x: 30 * torch.tanh(x / 30)),
    "another soft-cap": changed(after=lambda _, x: x / (1 + x.abs() / 30)),
    "clamped": changed(after=lambda _, x: x.clamp(-50, 50)),
    "normalised": changed(after=lambda _, x: x.log_softmax(-1)),
    "a masked token": changed(after=lambda _, x: x + MASKED),
    "fewer tokens": changed(after=lambda _, x: x[..., :60]),
    "a trained scale": changed(after=lambda self, x: x * self.gain),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_functions_of_the_hidden_state_are_refused_in_one_sentence(name, dtype):
    model = OTHERS[name].to(dtype)
    config = make_config({"dataset_name": __file__, "model_name_or_path": "."})
    with pytest.raises(ValueError, match=r"cannot be used by itself: .*(hidden state|head's products)"):
        ops.lm_head(model)
    with pytest.raises(InputError, match="its head cannot be used by itself"):
        prepare_model(model, config, ragged())


CLASSIFIERS = ["Llama", "Gemma 2", "OPT", "GPT-J, bias", "Phi, bias"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_heads_of_a_reward_model_give_its_logits(name):
    kind, keys, *_ = FAMILIES[name]
    config = getattr(transformers, kind)(**keys, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        expected = model(input_ids=ids).logits
    head = score_head(model)
    assert head[2:] == (1.0, None)
    torch.testing.assert_close(linear(hidden[-1:], head.weight, head.bias), expected)


def test_a_classifier_with_another_head_is_refused():
    bart = transformers.BartConfig(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48)
    with pytest.raises(
        ValueError, match=r"BartForSequenceClassification: found head NoneType, expected torch.nn.Linear"
    ):
        score_head(transformers.BartForSequenceClassification(bart))
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SHAPE, num_labels=1))
    model.score.register_forward_pre_hook(lambda module, given: (given[0].tanh(),))
    with pytest.raises(ValueError, match="the head reads something else than the last hidden state"):
        score_head(model)


def test_a_head_that_peft_trains_whole_is_the_trained_copy():
    import peft

    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model_of("Gemma 2"), settings)
    head, batch = ops.lm_head(model), pack(ragged())
    assert head.weight.requires_grad
    assert head[2:] == (1.0, 3.0)
    ops.log_ratio(hidden_states(model, batch), **arguments(head, batch)).log_ratio.sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_without_its_adapters_a_model_has_the_head_that_it_had_before():
    import peft

    original = model_of("Gemma 2")
    weight = original.lm_head.weight
    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(original, settings)
    model.add_adapter("second", settings)
    wrapper = original.get_output_embeddings()
    assert ops.lm_head(model).weight is wrapper.modules_to_save["default"].weight
    model.set_adapter("second")
    assert ops.lm_head(model).weight is wrapper.modules_to_save["second"].weight
    with model.disable_adapter():
        assert ops.lm_head(model).weight is weight
