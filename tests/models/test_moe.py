"""The load-balancing loss of a mixture of experts, on packed batches, is the loss that the model itself returns."""

import contextlib
import copy
import json
import re
from functools import partial

import peft
import pytest
import torch
import transformers

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.packing import PAD, Layout, PromptGroup, pack
from irlfast.engine.module import Policy
from irlfast.losses.inputs import Normalisers
from irlfast.losses.sft import sft_loss
from irlfast.models.checks import SEPARATE
from irlfast.models.forward import body_output
from irlfast.models.lora import add_lora, load_lora
from irlfast.models.moe import balancing_loss, check_router
from irlfast.models.steady import recompute_layers
from tests.data.test_packing import SHAPE, model_of, ragged
from tests.helpers.families import ALL, small_config
from tests.helpers.prepared import prepared
from tests.helpers.runs import run
from tests.helpers.tiers import slow

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "Mixtral": transformers.MixtralConfig(**SHAPE | EXPERTS),
    "Qwen2Moe": transformers.Qwen2MoeConfig(**SHAPE | EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3Moe": transformers.Qwen3MoeConfig(**SHAPE | EXPERTS),
    "OLMoE": transformers.OlmoeConfig(**SHAPE | EXPERTS),
    "GPT-OSS": transformers.GptOssConfig(**SHAPE | EXPERTS, layer_types=["sliding_attention", "full_attention"]),
}


def moe_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(ROUTED[name])).eval()


@pytest.mark.parametrize("name", ROUTED)
def test_the_loss_is_the_models_own_without_the_padding(name):
    model, batch = moe_model(name), pack(ragged(), SEPARATE)
    attention_mask = (batch.group != PAD).long()
    assert not attention_mask.all()
    check_router(model, 0.1)
    ours = balancing_loss(model, body_output(model, batch, output_router_logits=True).router_logits, batch)
    own = model(input_ids=batch.input_ids, attention_mask=attention_mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("name", ROUTED)
def test_all_groups_in_one_row_have_the_loss_of_separate_rows(name):
    model, losses = moe_model(name), []
    for layout in (SEPARATE, Layout(shared=False, one_row=True)):
        batch = pack(ragged(), layout)
        losses.append(balancing_loss(model, body_output(model, batch, output_router_logits=True).router_logits, batch))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_weights_the_loss_by_the_prompt_groups_of_a_micro_batch(recomputed):
    model = moe_model("Mixtral")
    groups = [PromptGroup(x.prompt, x.answers[:1]) for x in ragged()]
    parts, share = [pack(groups[:1]), pack(groups[1:])], Normalisers(4, 10)
    auxiliary = [
        balancing_loss(model, body_output(model, part, output_router_logits=True).router_logits, part) for part in parts
    ]
    mean = (auxiliary[0] + 3 * auxiliary[1]) / 4
    expected = torch.autograd.grad(mean, model.model.layers[0].mlp.gate.weight)[0]
    if recomputed:
        recompute_layers(model, selective=False)
    results, gradients = {}, {}
    for coefficient in (0.0, 0.5):
        policy = Policy(prepared(model), partial(sft_loss), router_aux_loss_coef=coefficient)
        losses, metrics = zip(*(policy(part, share) for part in parts), strict=True)
        results[coefficient] = sum(losses)
        gradients[coefficient] = torch.autograd.grad(sum(losses), model.model.layers[0].mlp.gate.weight)[0]
    torch.testing.assert_close(results[0.5] - results[0.0], 0.5 * mean)
    torch.testing.assert_close(gradients[0.5] - gradients[0.0], 0.5 * expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(sum(each["aux_loss"] for each in metrics) / 4, mean.detach())


def test_a_model_without_a_router_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"router_aux_loss_coef: found 0\.1, but LlamaForCausalLM has no router"):
        check_router(model_of("Llama"), 0.1)
    _, err = run(tmp_path / "run", code=2, router_aux_loss_coef=0.1)
    assert "irlfast: router_aux_loss_coef: found 0.1, but a llama has no router; expected 0" in err


def test_a_run_logs_the_loss(tmp_path):
    ROUTED["Mixtral"].to_json_file(tmp_path / "config.json", use_diff=False)
    keys = {"config_name": tmp_path / "config.json", "router_aux_loss_coef": 0.01, "max_length": 60}
    run(tmp_path / "run", **keys, max_prompt_length=40, method="sft", sft_steps=2, inner_steps="null", stages=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "aux_loss" in row)
    assert 1.9 < first["aux_loss"] < 4  # 2, the experts per token, if the load is even


def adapted_layers(model) -> list[str]:
    """The layers that have an adapter, by their names in the model without one."""
    named = (name.removeprefix("base_model.model.") for name, _ in model.named_parameters())
    return sorted({name.split(".lora_")[0] for name in named if ".lora_" in name})


def adapter(model, modules: str | list[str] = "all-linear"):
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "lora_r": 2, "lora_target_modules": modules}
    return add_lora(model, make_config(keys), reward=False)


@pytest.mark.parametrize(
    "names",
    [
        ["afmoe", "hunyuan_v1_moe", "longcat_flash", "mixtral", "phimoe", "qwen2_moe", "qwen3_next", "zaya"],
        pytest.param([name for name in ALL if not name.startswith("musicgen")], marks=slow),
    ],
    ids=["eight families", "all families"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_router_gets_no_adapter_and_every_other_linear_layer_has_the_one_that_peft_gives_it(names):
    """A router is known by its class, by that of the module which holds it, or by one output for a shared expert."""
    routed = 0
    for name in names:
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(small_config(name))
                plain = copy.deepcopy(model)
        except Exception:  # the table of tests/helpers/families.py says which ones cannot be built
            continue
        routers = [
            layer
            for layer, module in model.named_modules()
            if re.search("Router|TopKGating|MoEV1Gate", type(module).__name__)
            or (isinstance(module, torch.nn.Linear) and layer.endswith(("shared_expert_gate", "mlp.router")))
        ]
        with torch.device("meta"), contextlib.suppress(InputError, ValueError):
            settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
            whole = {*adapted_layers(peft.get_peft_model(plain, settings))}
            ours = {*adapted_layers(adapter(model))}
            left_out = whole - ours
            assert ours <= whole
            assert all(any(f"{layer}.".startswith(f"{each}.") for each in routers) for layer in left_out), name
            assert not any(f"{layer}.".startswith(f"{each}.") for layer in ours for each in routers), name
            routed += bool(left_out)
    assert routed >= 8


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_routers_is_saved_and_continued_without_them(name, tmp_path):
    model = adapter(moe_model(name))
    model.save_pretrained(tmp_path)
    again = load_lora(moe_model(name), tmp_path, reward=False)
    assert adapted_layers(again) == adapted_layers(model)
    assert not [layer for layer in adapted_layers(model) if layer.endswith("gate")]
    assert "model.layers.0.mlp.gate" in adapted_layers(adapter(moe_model("Mixtral"), ["q_proj", "gate"]))
