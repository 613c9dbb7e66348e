"""Runs with the options that the default leaves off, each a real run of a few steps."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from irlfast.engine import kept_by_merging
from tests.runs import printed, run, settings


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_lora_in_bf16_with_checkpointed_layers_and_zero_2(tmp_path):
    """The adapters are merged, so that the result is a plain model of the base's shape, moved from the base."""
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
    base, final = weights(tmp_path / "run" / "sft" / "policy"), weights(tmp_path / "run" / "final")
    assert base.keys() == final.keys()
    moved = {name for name in base if not torch.equal(base[name], final[name])}
    assert moved == {name for name in base if name.endswith("proj.weight")}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").dtype == torch.bfloat16


COUNTED = """
import gc, sys
import irlfast.engine as engine
from irlfast.train import main
whole = engine.train_step
def train_step(*given):
    print("models:", sum(type(kept).__name__ == "LlamaForCausalLM" for kept in gc.get_objects()), file=sys.stderr)
    return whole(*given)
engine.train_step = train_step
sys.exit(main())
"""


LORA = {"use_peft": "true", "learning_rate": 1e-2, "warmup_ratio": 0, "logging_steps": 1}


def test_a_stages_reference_is_its_policy_without_the_new_adapter_and_no_second_model_is_held(tmp_path):
    script, output = tmp_path / "counted.py", tmp_path / "run"
    script.write_text(COUNTED)
    _, err = printed([str(script), *settings(output, **LORA)])
    assert set(re.findall(r"models: \d+", err)) == {"models: 1"}
    before, after = output / "stage-00" / "policy", output / "stage-01" / "policy"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(before), output / "stage-01" / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(before)
    merged = AutoModelForCausalLM.from_pretrained(after)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            reference = adapted(ids).logits
    assert (reference - merged(ids).logits).abs().max() > 1e-2
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    begins = [row["rewards/chosen"] for row in rows if row["step"] == 1 and row["phase"] != "sft"]
    assert begins == pytest.approx([0, 0], abs=1e-5)  # the reference's log-probabilities are the policy's own


def test_an_engine_of_zero_3_does_not_live_on_beside_the_next(tmp_path):
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)
    _, err = printed([str(script), *settings(tmp_path / "run", zero_stage=3, dtype="bfloat16")])
    assert set(re.findall(r"models: \d+", err)) == {"models: 1"}


@pytest.mark.parametrize(("size", "least", "most"), [(1e-6, 0.0, 0.1), (1.0, 0.99, 1.01)])
def test_what_merging_into_16_bits_keeps_of_an_adapter(size, least, most):
    config = LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    assert kept_by_merging(adapted) == 1  # nothing has been learned
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    assert least <= kept_by_merging(adapted) <= most


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
    assert list((output / "tensorboard").glob("events*"))
    figures = {path.parent.name: json.loads(path.read_text())["nll"] for path in output.glob("*/eval.json")}
    best = min(figures, key=figures.__getitem__)
    assert json.loads((output / "final" / "policy.json").read_text())["kept"] == best
    assert f"from {best}" in out + err


def test_a_pretrained_folder_initial_reference_hinge_and_no_sft(tmp_path, finished):
    run(
        tmp_path / "run",
        config_name="null",
        train_tokenizer="null",
        model_name_or_path=finished[0] / "sft" / "policy",
        sft_steps=0,
        reference="initial",
        loss_type="hinge",
        gradient_accumulation_steps=2,
        inner_steps="null",
        inner_epochs=1,
    )
    assert (tmp_path / "run" / "initial" / "eval.json").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"stage-00", "stage-01"}
    assert rows[-1]["step"] == 3  # 48 pairs of a stage in steps of 16
    [first, second] = (load_file(tmp_path / "run" / f"stage-0{i}" / "reference.safetensors") for i in (0, 1))
    assert first["values"].shape != second["values"].shape or not torch.equal(first["values"], second["values"])


def test_sft_alone_of_a_given_model_is_held_against_that_model(tmp_path, finished):
    start = {"model_name_or_path": finished[0] / "sft" / "policy", "config_name": "null", "train_tokenizer": "null"}
    run(tmp_path / "run", method="sft", inner_steps="null", **start)
    initial, trained = (
        json.loads((tmp_path / "run" / phase / "eval.json").read_text()) for phase in ("initial", "sft")
    )
    assert trained["nll"] < initial["nll"]
    assert initial["margin"] is None
    assert trained["margin"] > 0
