"""A prepared model is probed once, and its record stays right while the model is trained."""

import copy

import peft
import pytest
import torch
import transformers

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.batching import cost_of
from irlfast.data.packing import pack, token_counts
from irlfast.engine.module import Policy
from irlfast.losses.inputs import Normalisers
from irlfast.losses.sft import sft_loss
from irlfast.models import checks
from irlfast.models.checks import SEPARATE, can_share_prompts, probe_states
from irlfast.models.costs import operations
from irlfast.models.prepare import prepare_model
from irlfast.ops.common import heads
from tests.data.test_packing import FAMILIES, SHAPE, model_of, ragged
from tests.models.test_attention import of_lengths

CONFIG = make_config({"dataset_name": __file__, "model_name_or_path": "."})


def test_a_training_step_probes_nothing_again(monkeypatch):
    model = model_of("Gemma2, soft-cap, window 4")
    prepared = prepare_model(model, CONFIG, ragged())
    assert prepared.logit_softcap == 3.0
    heads.PROBED.clear()
    for module, name in ((heads, "probe"), (checks, "probe_batch")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("probed again"))
    loss, _ = Policy(prepared, sft_loss)(pack(ragged()), Normalisers(4, 50))
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_the_head_has_the_tensors_that_the_model_has_now():
    model = model_of("Llama")
    prepared = prepare_model(model, CONFIG, ragged())
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight)
    assert prepared.head().weight is model.lm_head.weight


def test_the_head_of_an_adapted_model_is_the_copy_that_peft_trains():
    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model_of("Llama"), settings).eval()
    prepared = prepare_model(model, CONFIG, ragged())
    [trained] = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert prepared.head().weight is trained and trained.requires_grad
    assert prepared.model is model and type(prepared.base) is transformers.LlamaForCausalLM


def test_a_reward_model_is_prepared_with_its_heads_and_reads_last_tokens():
    config = transformers.LlamaConfig(**SHAPE, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    prepared = prepare_model(model, CONFIG, ragged())
    assert prepared.head().weight is model.score.weight
    assert prepared.layout.keep_last_token


class Recurrent(transformers.LlamaForCausalLM):
    """A model whose hidden states depend on all tokens before them in the row, whatever the mask says."""

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, given, states: states.cumsum(1))


def test_a_model_that_cannot_share_prompts_is_detected_and_reported_once(capsys):
    model = Recurrent(copy.deepcopy(FAMILIES["Llama"])).eval()
    sharing_model = model_of("Llama")
    assert can_share_prompts(sharing_model, probe_states(sharing_model, SEPARATE))
    assert [prepare_model(model, CONFIG, ragged()).layout.shared for _ in range(2)] == [False, False]
    assert capsys.readouterr().err.count("cannot share a prompt between answers; each gets its own") == 1


def test_a_model_without_a_linear_head_is_an_error_of_one_sentence():
    model = model_of("Llama")
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(InputError, match=r"found head Identity, expected torch\.nn\.Linear"):
        prepare_model(model, CONFIG, ragged())


def test_batches_are_balanced_by_the_operations_of_the_prepared_model():
    prepared = prepare_model(model_of("Llama"), CONFIG, ragged())
    layout, costs = prepared.layout, prepared.costs
    short, long = of_lengths(10, 5, 5)[0], of_lengths(60, 50, 7)[0]
    ratio = operations(costs, token_counts([long], layout)) / operations(costs, token_counts([short], layout))
    assert cost_of(long, layout) / cost_of(short, layout) == pytest.approx(ratio)
