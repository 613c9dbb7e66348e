"""QLoRA, if bitsandbytes is installed: ``make test`` gives it to this file alone, as it takes seconds to import."""

import copy
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from irlfast.config import make_config
from irlfast.data.packing import pack
from irlfast.data.store import load_examples
from irlfast.models.forward import hidden_states
from irlfast.models.load import load_model
from irlfast.models.lora import add_lora
from irlfast.models.prepare import prepare_model
from tests.commands.test_options import LORA
from tests.data.test_packing import model_of, ragged
from tests.helpers.runs import DEMO, contents, run, run_killed_at

pytest.importorskip("bitsandbytes")

QLORA = LORA | DEMO | {"load_in_4bit": "true", "use_bnb_nested_quant": "true", "stages": 1, "sft_steps": 20}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qlora_learns_and_resumes_and_its_final_model_is_close_to_the_trained_one(tmp_path, dtype):
    output, killed = tmp_path / "run", tmp_path / "killed"
    run(output, dtype=dtype, **QLORA)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["phase"] == "sft"]
    assert losses[-1] < 0.8 * losses[0]
    begin = next(row for row in rows if row["phase"] == "stage-00")
    rounding = 1e-5 if dtype == "float32" else 1e-3
    assert begin["rewards/chosen"] == pytest.approx(0, abs=rounding)  # the reference is the base in 4 bits
    final = AutoModelForCausalLM.from_pretrained(output / "final")
    assert not hasattr(final.config, "quantization_config")
    assert final.dtype == getattr(torch, dtype)
    check_merged(output, final)
    run_killed_at(killed, ["stage-00/checkpoint/step-2"], dtype=dtype, **QLORA)
    run(killed, dtype=dtype, **QLORA)
    assert contents(killed / "final") == contents(output / "final")


def check_merged(output, final):
    """Check that ``final`` is the 16-bit base plus the adapter, up to rounding of the weights and of the products."""
    config = make_config(yaml.safe_load((output / "config.yaml").read_text()))
    examples = load_examples(output / "data" / "eval.safetensors")

    def load(phase, in_4bit=False):
        return load_model(output / phase / "policy", config, in_4bit=in_4bit).eval()

    whole, in_4_bits = load("stage-00"), load("stage-00", in_4bit=True)
    assert "Linear4bit" in {type(module).__name__ for module in in_4_bits.modules()}
    state = final.state_dict()
    for name, layer in whole.named_modules():
        if hasattr(layer, "get_delta_weight"):
            merged_weight = state[f"{name.removeprefix('base_model.model.')}.weight"]
            base = layer.get_base_layer().weight
            a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
            delta = layer.scaling["default"] * b @ a
            half_a_digit = torch.finfo(final.dtype).eps / 2 * (merged_weight.double().norm() + delta.norm())
            assert (merged_weight - base.double() - delta).norm() <= half_a_digit, name
    merged = logps_of(final, examples)
    apart, exact = logps_of(whole, examples), logps_of(whole.float(), examples)
    rounded = logps_of(load("stage-00").float().merge_and_unload().to(final.dtype).float(), examples)
    assert distance(merged, apart) <= 2 * (distance(apart, exact) + distance(rounded, exact)) + 1e-5
    before = logps_of(load("initial"), examples)
    quantising = distance(logps_of(load("initial", in_4bit=True), examples), before)
    assert distance(logps_of(in_4_bits, examples), merged) < quantising < distance(merged, before)


def logps_of(model, examples):
    """Return the log-probability of every token of the examples."""
    with torch.no_grad():
        ids = [torch.tensor([[*example.prompt_ids, *example.answer_ids]]) for example in examples]
        logps = [model(own).logits[:, :-1].float().log_softmax(-1).gather(2, own[:, 1:, None]) for own in ids]
    return torch.cat([own.flatten() for own in logps])


def distance(one, other):
    return (one - other).abs().mean().item()


def test_a_reward_model_and_the_policy_aligned_to_it_learn_in_4_bits(tmp_path):
    output = tmp_path / "run"
    keys = {"method": "rft", "num_generations": 3, "kl_in": "loss", "align": "ppo"}
    keys |= {"reward_steps": 20, "reward_learning_rate": 3e-4}  # at the policy's rate, losses jump up to 4
    run(output, **QLORA | keys)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rewards, policy = ([row for row in rows if row["phase"] == name] for name in ("stage-00/reward", "stage-00"))
    assert rewards[-1]["loss"] < 0.8 * rewards[0]["loss"]
    assert policy[0]["kl"] == pytest.approx(0, abs=1e-5)  # old and reference are the base in 4 bits, too
    assert policy[0]["grad_norm"] > 0
    assert policy[-1]["kl"] != pytest.approx(0, abs=1e-5)
    reward = AutoModelForSequenceClassification.from_pretrained(output / "stage-00" / "reward" / "model")
    for model in (reward, AutoModelForCausalLM.from_pretrained(output / "final")):
        assert not hasattr(model.config, "quantization_config")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested, heads", [(False, 0), (True, 0), (True, 2)])
def test_gradients_through_4_bits_are_those_of_the_dequantised_weights(tmp_path, dtype, nested, heads):
    """They agree up to PyTorch's own error in that dtype. A forward pass without gradients comes first, which must not
    change how the layers train. Reward heads are not quantised."""
    keys = {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": nested, "lora_r": 4}
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    config = make_config({"dataset_name": __file__, "model_name_or_path": str(tmp_path), "dtype": name} | keys)
    model_of("Llama").save_pretrained(tmp_path)
    quantised = load_model(tmp_path, config, heads, in_4bit=True)
    assert prepare_model(quantised, config, ragged()).layout.shared
    assert type(quantised.score if heads else quantised.lm_head) is torch.nn.Linear
    adapted = add_lora(quantised, config, reward=bool(heads))
    dequantised = add_lora(load_model(tmp_path, config, heads, in_4bit=True).dequantize(), config, reward=bool(heads))
    for model in (adapted, dequantised):
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():  # B starts at 0, and A would have no gradient
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(dequantised).double()
    ours, plain, true = (adapter_gradients(model) for model in (adapted, dequantised, exact))
    assert ours.keys() == true.keys()
    for parameter, gradient in true.items():
        assert gradient.norm() > 0
        theirs = (plain[parameter] - gradient).norm() + 1e-5 * gradient.norm()
        assert (ours[parameter] - gradient).norm() <= 2 * theirs, parameter


def adapter_gradients(model):
    """Return the gradients of the adapter's tensors by name; the loss is a weighted sum of all hidden states."""
    hidden = hidden_states(model, pack(ragged())).double()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if "lora" in name}
