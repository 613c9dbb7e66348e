"""Loading and saving: every tensor of a checkpoint, adapters and their bases, and new embedding rows."""

import copy
import json
import shutil
import types

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.models.build import resize_model
from irlfast.models.load import load_model, save_pretrained
from irlfast.models.lora import base_and_adapter, check_adapter
from irlfast.models.tokenizers import load_tokenizer
from irlfast.sampling.transformers_sampler import check_logits
from irlfast.startup.prepare import check_weights, starting_policy
from tests.data.test_packing import FAMILIES, model_of
from tests.helpers.tokenizers_like import pythia


def config_of(folder, **keys):
    return make_config({"dataset_name": __file__, "model_name_or_path": str(folder), "dtype": "float32"} | keys)


def test_a_checkpoint_that_lacks_tensors_is_refused_and_one_with_more_is_logged(tmp_path, capsys):
    model_of("Llama").save_pretrained(tmp_path)
    path, kept = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    save_file(kept | {"vision.weight": torch.ones(2), "vision.bias": torch.ones(2)}, path)
    load_model(tmp_path, config_of(tmp_path))
    assert "has no place for 2 tensors of its checkpoint, such as vision.bias; they are not" in capsys.readouterr().err
    save_file({name: tensor for name, tensor in kept.items() if "layers.1.mlp" not in name}, path)
    with pytest.raises(
        InputError, match=r"found no (model\.layers\.1\.mlp\.\S+ ){3}\(3 tensors missing\), expected all of"
    ):
        load_model(tmp_path, config_of(tmp_path))


def test_every_process_can_save_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 1)
    model = model_of("Llama")
    save_pretrained(tmp_path, model, pythia())
    assert load_file(tmp_path / "model.safetensors") and json.loads((tmp_path / "config.json").read_text())


def test_tensors_that_transformers_ignores_in_a_checkpoint_are_logged(tmp_path, capsys):
    model_of("GPT-NeoX").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"gpt_neox.layers.0.attention.bias": torch.ones(2)}, path)
    load_model(tmp_path, config_of(tmp_path))
    assert "for 1 tensors of its checkpoint, such as gpt_neox.layers.0.attention.bias" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_new_embedding_rows_are_the_mean_of_the_old_rows_which_do_not_change(tmp_path, tied):
    config = transformers.LlamaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=tied)
    given = transformers.LlamaForCausalLM(config)
    given.save_pretrained(tmp_path / "given")
    tokenizer = load_tokenizer(
        make_config({"dataset_name": __file__, "config_name": __file__, "train_tokenizer": 300}), ["some text"]
    )
    resize_model(config_of(tmp_path / "given"), tokenizer, tmp_path / "grown")
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert grown.config.vocab_size == 1 + max(tokenizer.get_vocab().values()) > 61
    for old, new in zip(*((x.get_input_embeddings(), x.get_output_embeddings()) for x in (given, grown)), strict=True):
        assert torch.equal(new.weight[:61], old.weight)
        assert torch.equal(new.weight[61:], old.weight.mean(0).expand_as(new.weight[61:]))


# ---------------------------------------------------------------- adapters


def adapter_of(folder, base, **settings):
    """Save a LoRA adapter whose tensors are all random; return its folder and the logits of the model with it."""
    torch.manual_seed(1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base)
    own = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(loaded, peft.LoraConfig(**own)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter).abs())
        logits = model(torch.arange(3, 12)[None]).logits
    model.save_pretrained(folder)
    return folder, logits


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_dropout": 0.5}),
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=str,
)
def test_supported_adapters_load_as_peft_loads_them(tmp_path, settings):
    config = copy.deepcopy(FAMILIES["Qwen2"])
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")  # its projections have biases
    folder, logits = adapter_of(tmp_path / "adapter", tmp_path / "base", **settings)
    keys = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}
    check_adapter(folder, config_of(folder, **keys))
    model = load_model(folder, config_of(folder, **keys)).eval()
    torch.testing.assert_close(model(torch.arange(3, 12)[None]).logits, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}, {"lora_bias": True}],
    ids=str,
)
def test_unsupported_adapters_are_refused_and_the_setting_is_named(tmp_path, settings):
    model_of("Llama").save_pretrained(tmp_path / "base")
    folder, _ = adapter_of(tmp_path / "adapter", tmp_path / "base", **settings)
    [name] = settings
    with pytest.raises(InputError, match=rf"adapter \S+: found {name}: .*, which training cannot go on with; expected"):
        check_weights(config_of(folder, use_peft=True, lora_r=4, lora_alpha=8))


@pytest.mark.parametrize("adapter, base", [("stage-00/policy", "initial/policy"), ("adapter", "base"), ("a", "b/c/d")])
def test_the_base_of_a_moved_adapter_is_found_where_it_moved_to(tmp_path, adapter, base):
    first, moved = tmp_path / "first", tmp_path / "elsewhere" / "moved"
    model_of("Llama").save_pretrained(first / base)
    adapter_of(first / adapter, first / base)
    moved.parent.mkdir()
    shutil.move(first, moved)
    assert base_and_adapter(moved / adapter) == (str(moved / base), moved / adapter)
    shutil.rmtree(moved / base)
    with pytest.raises(InputError, match=r"adapter \S+: found no \S+, expected its base as adapter_config.json says"):
        base_and_adapter(moved / adapter)


def test_the_hub_revision_is_the_runs_for_its_model_and_the_adapters_for_its_base(tmp_path, monkeypatch):
    asked = []
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(
            kind, "from_pretrained", lambda name, revision, **_: asked.append((name, revision)) or 1 / 0
        )
    config = config_of("owner/model", model_revision="v2")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base", "revision": "v3"})
    )
    for load, *given in (
        (load_tokenizer, config, []),
        (load_model, "owner/model", config),
        (load_model, tmp_path, config),
    ):
        with pytest.raises(InputError, match="division by zero"):
            load(*given)
    assert asked == [("owner/model", "v2"), ("owner/model", "v2"), ("owner/base", "v3")]


def test_tensors_that_a_start_model_lacks_are_named_and_get_values_by_the_seed(tmp_path, capsys):
    model_of("Llama").save_pretrained(tmp_path / "given")
    path, kept = tmp_path / "given" / "model.safetensors", load_file(tmp_path / "given" / "model.safetensors")
    lacks = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in kept.items() if name != lacks}, path)
    encoder = types.SimpleNamespace(
        tokenizer=load_tokenizer(
            make_config({"dataset_name": __file__, "config_name": __file__, "train_tokenizer": 300}), ["some text"]
        )
    )
    starts = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = config_of(tmp_path / "given", seed=seed, allow_missing_weights=True)
        torch.rand(3)  # whatever was drawn before
        start = starting_policy(config, tmp_path / name, encoder)
        assert f"found no {lacks}: new, seeded values" in capsys.readouterr().err
        starts[name] = load_model(start, config).state_dict()  # it lacks nothing
    assert all(torch.equal(tensor, starts["a"][name]) for name, tensor in kept.items() if name != lacks)
    assert starts["a"][lacks].std().item() == pytest.approx(kept[lacks].std().item(), rel=0.2)
    assert torch.equal(starts["a"][lacks], starts["b"][lacks])
    assert not torch.equal(starts["a"][lacks], starts["c"][lacks])
    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "given")}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=r"allow_missing_weights: found true with the adapter .* expected a whole model"
    ):
        starting_policy(config_of(tmp_path / "lora", allow_missing_weights=True), tmp_path / "d", encoder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_weight_that_is_not_finite_is_refused_by_its_name(tmp_path, value):
    model_of("Llama").save_pretrained(tmp_path)
    path, kept = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    kept[name][3, 4] = value
    save_file(kept, path)
    with pytest.raises(InputError, match=rf"{name} \(of 1 tensors\) is not finite"):
        load_model(tmp_path, config_of(tmp_path))


def test_a_model_whose_logits_are_nan_is_refused_before_it_answers(tmp_path):
    model = model_of("Llama")
    check_logits(model, tmp_path, [1, 2, 3])
    for parameter in model.model.layers[1].parameters():
        parameter.data.fill_(3e38)  # finite, and infinite once it is summed
    with pytest.raises(InputError, match="its logits are NaN, so that it cannot answer"):
        check_logits(model, tmp_path, [1, 2, 3])
