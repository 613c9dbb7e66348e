"""QLoRA, where bitsandbytes is: ``make test`` gives it to this file alone, as it takes seconds to import."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from irlfast.attention import APART, check_model, hidden_of, hidden_states
from irlfast.config import make_config
from irlfast.data import load_examples
from irlfast.lora import add_lora
from irlfast.model import load_model
from irlfast.pack import pack
from tests.runs import contents, run, run_killed_at
from tests.test_options import LORA
from tests.test_pack import model_of, ragged

pytest.importorskip("bitsandbytes")

QLORA = LORA | {"load_in_4bit": "true", "use_bnb_nested_quant": "true", "stages": 1, "sft_steps": 20}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qlora_learns_resumes_and_leaves_a_whole_model_close_to_what_it_trained(tmp_path, dtype):
    output, killed = tmp_path / "run", tmp_path / "killed"
    run(output, dtype=dtype, **QLORA)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["phase"] == "sft"]
    assert losses[-1] < 0.8 * losses[0]
    begin = next(row for row in rows if row["phase"] == "stage-00")
    rounding = 1e-5 if dtype == "float32" else 1e-3
    assert begin["rewards/chosen"] == pytest.approx(0, abs=rounding)  # the reference is the base in 4 bits
    merged = AutoModelForCausalLM.from_pretrained(output / "final")
    assert not hasattr(merged.config, "quantization_config")
    assert merged.dtype == getattr(torch, dtype)
    config = make_config(yaml.safe_load((output / "config.yaml").read_text()))
    trained = load_model(output / "stage-00" / "policy", config, in_4bit=True).eval()
    assert "Linear4bit" in {type(module).__name__ for module in trained.modules()}
    example = load_examples(output / "data" / "eval.safetensors")[0]
    ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
    with torch.no_grad():
        ours, theirs, before = (
            model(ids).logits.float().log_softmax(-1).gather(2, ids.roll(-1)[..., None])[:, :-1]
            for model in (merged, trained, AutoModelForCausalLM.from_pretrained(output / "initial" / "policy"))
        )
    assert (ours - theirs).abs().mean() < 0.05 * (ours - before).abs().mean()
    run_killed_at(killed, "stage-00/checkpoint/progress.json", dtype=dtype, **QLORA)
    run(killed, dtype=dtype, **QLORA)
    assert contents(killed / "final") == contents(output / "final")


def test_a_reward_and_the_policy_aligned_to_it_learn_in_4_bits(tmp_path):
    output = tmp_path / "run"
    keys = {"method": "rft", "num_generations": 3, "kl_in": "loss", "align": "ppo", "reward_steps": 20}
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
def test_gradients_through_4_bits_are_those_of_the_same_weights_written_out(tmp_path, dtype, nested, heads):
    """Scored without a gradient before, which must not change how layers train. Reward heads stay whole."""
    keys = {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": nested, "lora_r": 4}
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    config = make_config({"dataset_name": __file__, "model_name_or_path": str(tmp_path), "dtype": name} | keys)
    model_of("Llama").save_pretrained(tmp_path)
    quantised = load_model(tmp_path, config, heads, in_4bit=True)
    assert check_model(quantised, hidden_of(quantised, APART))
    assert type(quantised.score if heads else quantised.lm_head) is torch.nn.Linear
    written_out = load_model(tmp_path, config, heads, in_4bit=True).dequantize()
    found = []
    for model in (quantised, written_out):
        adapted = add_lora(model, config, reward=bool(heads))
        for parameter in adapted.parameters():
            if parameter.requires_grad and not parameter.any():  # B starts at 0, and A would have no gradient
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        hidden = hidden_states(adapted, pack(ragged())).float()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        found.append({n: p.grad.float() for n, p in adapted.named_parameters() if "lora" in n})
    assert found[0].keys() == found[1].keys()
    for parameter, gradient in found[0].items():
        expected = found[1][parameter]
        assert expected.norm() > 0
        assert (gradient - expected).norm() <= (1e-4 if dtype == torch.float32 else 0.15) * expected.norm(), parameter
