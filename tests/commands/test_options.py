"""Runs with the options that the default leaves off, each a real run of a few steps."""

import copy
import itertools
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.models.load import load_model
from irlfast.models.lora import add_lora, merge, share_kept
from tests.helpers.runs import DEMO, printed, run, settings
from tests.helpers.tiers import full


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_lora_in_bf16_with_checkpointed_layers_and_zero_2(tmp_path):
    """The adapter is merged at last, so that the result is a plain model of the base's shape, moved from the base."""
    run(
        tmp_path / "run",
        dtype="bfloat16",
        use_peft="true",
        gradient_checkpointing="true",
        zero_stage=2,
        learning_rate=1e-2,
        stages=1,
        warmup_ratio=0,
    )
    base, final = weights(tmp_path / "run" / "initial" / "policy"), weights(tmp_path / "run" / "final")
    assert base.keys() == final.keys()
    moved = {name for name in base if not torch.equal(base[name], final[name])}
    assert moved == {name for name in base if name.endswith("proj.weight")}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").dtype == torch.bfloat16


LORA = {"use_peft": "true", "learning_rate": 1e-2, "warmup_ratio": 0, "logging_steps": 1}


@full
def test_a_stage_continues_the_adapter_of_the_one_before_and_no_second_model_is_held(tmp_path):
    output = tmp_path / "run"
    _, err = printed(["-m", "tests.helpers.count_models", *settings(output, **LORA)])
    assert set(re.findall(r"models: \d+", err)) == {"models: 1"}
    ids = torch.arange(3, 40)[None]
    logits = {}
    for phase in ("sft", "stage-00", "stage-01"):
        folder = output / phase / "policy"
        assert not (folder / "model.safetensors").exists()
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            output / "initial" / "policy"
        )
        logits[phase] = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    logits["final"] = AutoModelForCausalLM.from_pretrained(output / "final")(ids).logits
    torch.testing.assert_close(logits["final"], logits["stage-01"], rtol=1e-4, atol=1e-4)
    for before, after in itertools.pairwise(("sft", "stage-00", "stage-01")):
        assert (logits[before] - logits[after]).abs().max() > 1e-2
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    begins = [row["rewards/chosen"] for row in rows if row["step"] == 1 and row["phase"] != "sft"]
    assert begins == pytest.approx([0, 0], abs=1e-5)  # the reference's log-probabilities are the policy's own


def check_all_is_kept(adapted, final):
    """Each merged weight is one of the two bf16 numbers beside its exact value, and their sum has what was learned."""
    assert final.dtype == torch.bfloat16
    kept = learned = 0.0
    for name, layer in adapted.named_modules():
        if hasattr(layer, "get_delta_weight"):
            found = final.get_submodule(name.removeprefix("base_model.model.")).weight.double()
            base = layer.get_base_layer().weight.double()
            a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
            delta = layer.scaling["default"] * b @ a
            digit = torch.finfo(torch.bfloat16).eps * torch.maximum(found.abs(), (base + delta).abs())
            assert ((found - base - delta).abs() <= digit).all(), name
            kept += ((found - base) * delta).sum().item()
            learned += delta.square().sum().item()
    assert kept / learned == pytest.approx(1, abs=0.1)  # to the nearest it is below 0.9, as above


@full
def test_what_lora_learns_in_bf16_is_not_rounded_away_at_the_end_of_a_stage(tmp_path):
    """Steps so small that merging each stage's would leave the weights as they were."""
    output, small = tmp_path / "run", {"learning_rate": 1e-5, "dtype": "bfloat16", "sft_steps": 0, "inner_steps": 8}
    _, err = run(output, **LORA | small | DEMO)
    assert re.search(r"\S+/stage-01/policy: rounding to the nearest bfloat16 would keep \d+% of what", err)
    last = output / "stage-01" / "policy"
    adapter = load_file(last / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(output / "initial" / "policy", dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, last)
    assert share_kept(adapted) < 0.9
    check_all_is_kept(adapted, AutoModelForCausalLM.from_pretrained(output / "final"))
    first = load_file(output / "stage-00" / "policy" / "adapter_model.safetensors")
    steps = {name: (values.float().norm(), (values - first[name]).float().norm()) for name, values in adapter.items()}
    learned = {name: sizes for name, sizes in steps.items() if "lora_B" in name}
    assert learned and all(moved > 0.3 * size > 0 for size, moved in learned.values())  # it began at 0


@full
def test_training_continues_another_runs_adapter_but_not_with_other_settings(tmp_path):
    sft = {"method": "sft", "inner_steps": "null"}
    run(tmp_path / "first", **LORA | sft)
    adapter = tmp_path / "first" / "sft" / "policy"
    start = sft | {"model_name_or_path": adapter, "config_name": "null", "train_tokenizer": "null"}
    run(tmp_path / "second", **LORA | start)
    [begin, end] = (json.loads((tmp_path / "second" / phase / "eval.json").read_text()) for phase in ("initial", "sft"))
    assert begin["nll"] == json.loads((tmp_path / "first" / "sft" / "eval.json").read_text())["nll"]
    assert end["nll"] < begin["nll"]
    _, err = run(tmp_path / "other", code=2, **LORA | start, lora_r=4)
    assert f"lora_r: found 4, but the adapter {adapter}, with which training goes on, has 16; expected the same" in err
    _, err = run(tmp_path / "whole", code=2, **start)
    assert f"model_name_or_path: found the adapter {adapter} without use_peft; expected use_peft: true" in err


def test_adapters_on_embeddings_that_the_head_shares_are_refused():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=64, num_hidden_layers=1, tie_word_embeddings=True))
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "lora_target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(InputError, match="lora_target_modules: found the embeddings, which the LM head shares"):
        add_lora(model, make_config(keys), reward=False)


def test_an_adapter_without_its_base_or_with_anothers_weights_is_refused(tmp_path):
    config = LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    whole = make_config({"dataset_name": __file__, "model_name_or_path": str(tmp_path), "dtype": "float32"})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    assert type(load_model(tmp_path / "adapter", whole)).__name__ == "PeftModelForCausalLM"
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = load_file(path)
    save_file({name: values for name, values in kept.items() if "layers.1" not in name}, path)
    with pytest.raises(InputError, match=r"adapter \S+: found no base_model\S+layers\.1\S+, expected"):
        load_model(tmp_path / "adapter", whole)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"adapter \S+: found no \S+/base, expected its base as adapter_config"):
        load_model(tmp_path / "adapter", whole)


@full
def test_an_engine_of_zero_3_does_not_live_on_beside_the_next(tmp_path):
    keys = settings(tmp_path / "run", zero_stage=3, dtype="bfloat16")
    _, err = printed(["-m", "tests.helpers.count_models", *keys])
    assert set(re.findall(r"models: \d+", err)) == {"models: 1"}


@pytest.mark.parametrize("config_class", [LlamaConfig, MixtralConfig])  # whose experts share a weight of three axes
@pytest.mark.parametrize(("size", "least", "most"), [(1e-6, 0.0, 0.1), (1.0, 0.99, 1.01)])
def test_what_merging_into_16_bits_keeps_of_an_adapter(size, least, most, config_class):
    config = config_class(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    assert share_kept(adapted) == 1  # nothing has been learned
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    assert least <= share_kept(adapted) <= most


@pytest.mark.parametrize("config_class", [LlamaConfig, MixtralConfig])
def test_weights_are_rounded_up_or_down_by_a_seeded_chance_where_rounding_to_nearest_loses_much(config_class):
    config = config_class(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    exact, again = (copy.deepcopy(adapted) for _ in range(2))
    nearest = copy.deepcopy(adapted).merge_and_unload().state_dict()
    exact = exact.float().merge_and_unload().state_dict()
    found, again = (merge(each, "policy").state_dict() for each in (adapted, again))
    assert found.keys() == exact.keys() == nearest.keys()
    for name, values in found.items():
        assert values.dtype == torch.bfloat16 and torch.equal(values, again[name])
        digit = torch.finfo(torch.bfloat16).eps * torch.maximum(values.float().abs(), exact[name].abs())
        assert ((values.float() - exact[name]).abs() <= digit).all(), name
    assert any(not torch.equal(values, nearest[name]) for name, values in found.items())


def test_spin_with_adamw_zero_0_tensorboard_own_deepspeed_json_and_the_best_policy(tmp_path):
    own = tmp_path / "deepspeed.json"
    own.write_text(json.dumps({"gradient_clipping": 0.25, "zero_optimization": {"stage": 0}}))
    out, err = run(
        tmp_path / "run",
        method="spin",
        optim="adamw_torch",
        zero_stage=0,
        deepspeed=own,
        report_to="tensorboard",
        keep="best",
        metric_for_best_model="nll",
        learning_rate=[1e-5, 1e-6],
        beta=[0.1, 5.0],
        nll_weight=0.1,
        activation_offloading="true",
    )
    assert "activation_offloading: activations are in host memory already, on a CPU" in err
    output = tmp_path / "run"
    pairs = [json.loads((output / f"stage-0{stage}" / "pairs.json").read_text()) for stage in (0, 1)]
    assert pairs[0]["from_history"] == 0
    assert pairs[1]["from_history"] == 96  # every prompt again, and the stage before mixed in
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in pairs)  # of the stage's own answers
    assert list((output / "tensorboard").glob("events*"))
    metrics = {path.parent.name: json.loads(path.read_text())["nll"] for path in output.glob("*/eval.json")}
    best = min(metrics, key=metrics.__getitem__)
    assert json.loads((output / "final" / "policy.json").read_text())["kept"] == best
    assert f"from {best}" in out + err


@full
def test_a_pretrained_folder_initial_reference_hinge_and_no_sft(tmp_path, finished):
    run(
        tmp_path / "run",
        config_name="null",
        train_tokenizer="null",
        model_name_or_path=finished[0] / "sft" / "policy",
        sft_steps=0,
        reference="initial",
        loss_type="hinge",
        global_batch_size=16,
        inner_steps="null",
        inner_epochs=1,
    )
    assert (tmp_path / "run" / "initial" / "eval.json").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"stage-00", "stage-01"}
    assert rows[-1]["step"] == 3  # 48 pairs of a stage in steps of 16
    [first, second] = (load_file(tmp_path / "run" / f"stage-0{i}" / "reference.safetensors") for i in (0, 1))
    assert first["values"].shape != second["values"].shape or not torch.equal(first["values"], second["values"])


@full
def test_sft_alone_of_a_given_model_is_compared_with_that_model(tmp_path, finished):
    start = {"model_name_or_path": finished[0] / "sft" / "policy", "config_name": "null", "train_tokenizer": "null"}
    run(tmp_path / "run", method="sft", inner_steps="null", **start)
    initial, trained = (
        json.loads((tmp_path / "run" / phase / "eval.json").read_text()) for phase in ("initial", "sft")
    )
    assert trained["nll"] < initial["nll"]
    assert initial["margin"] is None
    assert trained["margin"] > 0
