"""The load-balancing loss of a mixture of experts, on packed batches, is the loss that the model itself returns."""

import copy
import json
from functools import partial

import pytest
import torch
import transformers

from irlfast.common.files import InputError
from irlfast.data.packing import PAD, Layout, PromptGroup, pack
from irlfast.engine.module import Policy
from irlfast.losses.inputs import Normalisers
from irlfast.losses.sft import sft_loss
from irlfast.models.checks import SEPARATE
from irlfast.models.forward import body_output
from irlfast.models.moe import balancing_loss, check_router
from irlfast.models.steady import recompute_layers
from tests.data.test_packing import SHAPE, model_of, ragged
from tests.helpers.prepared import prepared
from tests.helpers.runs import run

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
