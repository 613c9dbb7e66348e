"""lm_head on each family of Transformers that a small config builds: right in any dtype, or refused with the reason."""

import pytest
import torch
import transformers
from torch.nn.functional import linear
from transformers.models.auto import modeling_auto

from irlfast import ops
from irlfast.ops.common.heads import body_of
from tests.helpers.families import small_config
from tests.helpers.tiers import slow

CAUSAL = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE = sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
SAMPLE = [
    *("llama", "cohere", "cohere2", "granite", "granitemoe", "hyperclovax", "recurrent_gemma", "xlstm", "gemma3n_text"),
    *("gemma4_text", "bert", "paligemma", "gemma3", "gemma4", "mistral3", "llava", "blip-2"),
]
FAMILIES = [
    pytest.param(auto, name, marks=() if name in SAMPLE else slow, id=name)
    for auto, names in (
        (transformers.AutoModelForCausalLM, CAUSAL),
        (transformers.AutoModelForImageTextToText, [name for name in IMAGE if name not in CAUSAL]),
    )
    for name in names
]
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MAX_PARAMETERS = 30_000_000  # of a model that a test builds


def capped_model(auto: type, name: str) -> torch.nn.Module:
    """A small model whose soft-cap, where its family has one, is 30: small logits do not show this in bf16."""
    config = small_config(name)
    text = config.get_text_config()
    for key in CAPS:
        if hasattr(text, key):
            setattr(text, key, 30.0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters are not small")
    torch.manual_seed(0)
    return auto.from_config(config).float().eval()


@pytest.mark.parametrize(("auto", "name"), FAMILIES)
def test_a_familys_head_is_the_models_own_in_every_dtype_or_refused_with_the_reason(auto, name):
    try:
        model = capped_model(auto, name)
    except Exception as error:
        pytest.skip(f"the family needs another config: {error!r}")
    heads = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):  # the last one rounds no weight
        try:
            heads.append(ops.lm_head(model.to(dtype)))
        except ValueError as error:
            assert any(reason in str(error) for reason in ("cannot be used", "cannot be probed", "expected torch.nn.L"))
            heads.append(None)
    head = heads[-1]
    if head is None:
        assert heads == [None] * 3
        return
    assert all(other is None or other[2:] == head[2:] for other in heads)
    ids = torch.arange(3, 12)[None]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    except Exception as error:
        pytest.skip(f"the family needs another input: {error!r}")
    expected = linear(hidden, head.weight, head.bias) * head.logit_scale
    if head.logit_softcap is not None:
        assert head.logit_softcap == 30
        expected = 30 * torch.tanh(expected / 30)
    torch.testing.assert_close(expected, logits, rtol=1e-4, atol=1e-5)
