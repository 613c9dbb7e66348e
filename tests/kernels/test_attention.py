"""On a GPU: rows of several prompt groups, by each attention that takes them, against separate sequences in fp32."""

import copy

import numpy as np
import pytest
import torch
import transformers

from irlfast.config import make_config
from irlfast.data.packing import Layout, PromptGroup, pack
from irlfast.models import varlen
from irlfast.models.attention import unshared_attention
from irlfast.models.forward import hidden_states
from irlfast.models.prepare import prepare_model
from tests.data.test_packing import separate, with_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
LLAMA = transformers.LlamaConfig(**SHAPE)
MISTRAL = transformers.MistralConfig(**SHAPE, sliding_window=100)


def model_of(config: transformers.PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).cuda().eval()


def groups() -> list[PromptGroup]:
    draw = np.random.default_rng(0)
    lengths = [(200, (300, 90)), (1, (70, 1)), (350, (5, 128)), (40, (130, 260))]
    return [
        PromptGroup(draw.integers(1, 1000, prompt).tolist(), tuple(draw.integers(1, 1000, n).tolist() for n in answers))
        for prompt, answers in lengths
    ]


def errors(actual: tuple, exact: tuple) -> list[float]:
    """The largest error of the log-probabilities, and the relative error of each gradient."""
    apart = [(ours.float() - theirs).norm() / theirs.norm() for ours, theirs in zip(actual[1], exact[1], strict=True)]
    return [(actual[0].float() - exact[0]).abs().max().item(), *map(float, apart)]


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["Llama", "Mistral, window 100"])
@pytest.mark.parametrize("kind", ["flex_attention", "flash-attn", varlen.NAME])
def test_packed_groups_are_no_worse_than_separate_ones(config, kind):
    model = model_of(config).to(torch.bfloat16).float()
    apart = [batch.to(model.device) for batch in separate(groups())]
    exact = with_gradients(model, apart)
    plain = errors(with_gradients(model.to(torch.bfloat16), apart), exact)
    if kind == "flash-attn":
        kind = unshared_attention(model)
        if kind in (varlen.NAME, None):
            pytest.skip("flash-attn is not installed here")
    elif kind == varlen.NAME and not varlen.register(model):
        pytest.skip("this torch has no varlen attention with windows and shared heads")
    model.set_attn_implementation(kind)
    layout = Layout(shared=kind == "flex_attention", one_row=True)
    actual = errors(with_gradients(model, [pack(groups(), layout).to(model.device)]), exact)
    assert all(ours <= 2 * theirs + 1e-3 for ours, theirs in zip(actual, plain, strict=True)), (actual, plain)


def test_a_phase_chooses_attention_by_the_lengths_and_tries_it():
    config = make_config({"dataset_name": __file__, "model_name_or_path": "."})
    model = model_of(LLAMA).to(torch.bfloat16)
    shared = prepare_model(model, config, groups()).layout
    assert shared.shared and shared.one_row and model.config._attn_implementation == "flex_attention"
    if unshared_attention(model) is None:
        pytest.skip("neither flash-attn nor torch's own varlen attention is here")
    short = [PromptGroup([1], ([2] * 200, [3] * 200))] * 4
    model = model_of(LLAMA).to(torch.bfloat16)
    assert not prepare_model(model, config, short).layout.shared
    assert model.config._attn_implementation == unshared_attention(model)


def test_no_batch_of_a_run_has_all_its_scores_in_memory():
    """torch gives compilation up after 8 kinds of batches, where it is not told otherwise."""
    config = make_config({"dataset_name": __file__, "model_name_or_path": ".", "attn_implementation": "flex_attention"})
    scores = 4 * 4096**2 * 4  # bytes: heads, pairs of tokens, fp32
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(LLAMA).to(dtype)
        model.set_attn_implementation("flex_attention")
        prepare_model(model, config, groups())
        for rows, lengths in [(1, (60, 70)), (3, (20, 30)), (2, (300, 5)), (1, (4000, 90))]:
            batch = pack([PromptGroup([1], tuple([2] * n for n in lengths))] * rows, Layout(True, rows == 1)).to("cuda")
            for gradients in (False, True):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                with torch.set_grad_enabled(gradients):
                    hidden_states(model, batch)
                torch.cuda.synchronize()
                assert torch.cuda.max_memory_allocated() - before < scores, (dtype, rows, lengths, gradients)
