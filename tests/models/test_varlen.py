"""torch's own varlen attention. Its kernels need a GPU: here a plain function replaces them, or checks their shapes."""

from unittest import mock

import pytest
import torch
import transformers
from torch.nn.attention import varlen as torchs
from torch.nn.functional import scaled_dot_product_attention

from irlfast.common.files import InputError
from irlfast.data.packing import Layout, pack
from irlfast.models import varlen
from irlfast.models.attention import unshared_attention
from irlfast.models.checks import SEPARATE, check_layout, probe_states
from irlfast.models.forward import hidden_states
from tests.data.test_packing import FAMILIES, model_of, ragged, separate, with_gradients

ROW = Layout(shared=False, one_row=True)
UNCAPPED = [name for name in FAMILIES if "soft-cap" not in name]


def plain(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Compute what torch's documentation says of ``varlen_attn``, by SDPA."""
    assert max_q >= int(cu_seq_q.diff().max()) and window_size[1] == 0
    attended = []
    for first, end in zip(cu_seq_q[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True):
        q, k, v = (x[first:end].transpose(0, 1) for x in (query, key, value))
        before = torch.arange(end - first)[:, None] - torch.arange(end - first)
        mask = (before >= 0) & (before <= (window_size[0] if window_size[0] >= 0 else end))
        output = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        attended.append(output.transpose(0, 1))
    return torch.cat(attended)


def blind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """Compute attention as if a row were one sequence."""
    whole = cu_seq_q[[0, -1]]
    return plain(query, key, value, whole, whole, len(query), len(query), **options)


@pytest.fixture
def kernel(monkeypatch):
    """Return a function that replaces torch's ``varlen_attn`` by another function of the same signature."""
    own = torchs.varlen_attn
    return lambda other: monkeypatch.setattr(torchs, "varlen_attn", mock.create_autospec(own, side_effect=other))


def with_varlen(model):
    assert varlen.register(model.to(torch.bfloat16))
    model.set_attn_implementation(varlen.NAME)
    return model.float()


@pytest.mark.parametrize("layout", [SEPARATE, ROW], ids=str)
@pytest.mark.parametrize("name", UNCAPPED)
def test_answers_have_the_log_probabilities_and_gradients_of_separate_ones(name, layout, kernel):
    kernel(plain)
    model, groups = model_of(name), ragged()
    model.to(torch.bfloat16).float()  # rounded, as with_varlen does
    expected, gradients = with_gradients(model, separate(groups))
    logps, packed_gradients = with_gradients(with_varlen(model), [pack(groups, layout)])
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


@pytest.mark.parametrize("name", ["Llama", "Mistral, window 4", "GPT-NeoX"])
def test_torchs_own_operation_accepts_a_layers_arguments_and_nothing_waits_for_a_value(name):
    meta = torch.device("meta")  # which has shapes and no values
    model = with_varlen(model_of(name)).to(torch.bfloat16).to(meta)
    hidden = hidden_states(model, pack(ragged(), ROW).to(meta))
    hidden.sum().backward()
    assert hidden.shape == (128, 32)
    assert all(parameter.grad is not None for parameter in model.base_model.parameters())


def test_varlen_is_chosen_only_if_it_can_run(monkeypatch):
    half = torch.bfloat16
    assert unshared_attention(model_of("Llama").to(half)) == "varlen"
    assert unshared_attention(model_of("Llama")) is None
    assert unshared_attention(model_of("Gemma2, soft-cap, window 4").to(half)) is None
    with monkeypatch.context() as odd:
        odd.setattr(varlen, "attention_head_size", lambda model: 12)
        assert unshared_attention(model_of("Llama").to(half)) is None
    monkeypatch.setattr(torchs, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: query)
    assert unshared_attention(model_of("Llama").to(half)) is None  # torch 2.10's
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert unshared_attention(model_of("Llama").to(half)) == "flash_attention_2"


def test_a_layer_with_a_soft_cap_is_refused(kernel):
    kernel(plain)
    varlen.register(model_of("Llama").to(torch.bfloat16))
    model = model_of("Gemma2, soft-cap, window 4")
    model.set_attn_implementation(varlen.NAME)
    with pytest.raises(ValueError, match="varlen has no softcap; expected sdpa or flex_attention"):
        hidden_states(model, pack(ragged(), ROW))


def test_an_attention_that_mixes_the_sequences_of_a_row_is_refused(kernel):
    model = model_of("Llama").to(torch.bfloat16).float()
    expected = probe_states(model, SEPARATE)
    with_varlen(model)
    kernel(plain)
    check_layout(model, ROW, expected)
    kernel(blind)
    with pytest.raises(InputError, match="LlamaForCausalLM: varlen mixes the sequences of a row; try attn_impl"):
        check_layout(model, ROW, expected)
