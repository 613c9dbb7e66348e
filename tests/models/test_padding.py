"""A reward model's padding token is in no text, template or end of an answer, and does not change scores."""

import random
import string

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from irlfast.config import Config
from irlfast.data.encoding import make_encoder
from irlfast.models.load import save_pretrained
from irlfast.models.padding import add_unique_padding
from irlfast.sampling.shards import GREEDY
from irlfast.sampling.transformers_sampler import generate_batch
from tests.helpers.tokenizers_like import FAMILIES, QWEN, byte_level

TURNS = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four!!!"}]


def padded_with(text: str | None, *more: str):
    """Return a base model's tokenizer. "!" is its first id after the special tokens."""
    tokenizer = byte_level(["<|endoftext|>", *more], "<|endoftext|>", None)
    tokenizer.pad_token = text
    return tokenizer


TOKENIZERS = FAMILIES | {
    "no padding": lambda: padded_with(None),
    "end token": lambda: padded_with("<|endoftext|>"),
    "exclamation mark": lambda: padded_with("!"),
    "own": lambda: padded_with("<pad>", "<pad>"),
    "reserved": lambda: padded_with(None, "<|tool|>", "<|reserved_special_token_0|>"),
    "for fine-tuning": lambda: padded_with(None, "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
    "in the template": lambda: byte_level(
        ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|pad|>" + QWEN
    ),
}
CHOSEN = {"own": "<pad>", "reserved": "<|reserved_special_token_0|>", "for fine-tuning": "<|finetune_right_pad_id|>"}


def drawn_texts(count: int) -> list[str]:
    draw = random.Random(0)
    pieces = [*string.punctuation, "!!!", "\n\n", " ", "the cat", "<pad>", "<unk>", "é", "東京", "🙂", "\t", "0"]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module", params=TOKENIZERS)
def saved(request, tmp_path_factory):
    """Return the case's name, the policy's encoder, and the folder of a reward model with its tokenizer."""
    encoder = make_encoder(TOKENIZERS[request.param](), Config(dataset_name="any"))
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(encoder.tokenizer), num_labels=1, pad_token_id=None, **size)
    model = LlamaForSequenceClassification(config)
    state = dict(model.state_dict())
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, model, add_unique_padding(model, encoder, state), state)
    return request.param, encoder, folder


def test_the_saved_tokenizer_encodes_and_decodes_texts_as_the_policys_does(saved):
    name, encoder, folder = saved
    tokenizer, policys = AutoTokenizer.from_pretrained(folder), encoder.tokenizer
    texts = drawn_texts(300)
    ids = policys(texts).input_ids
    assert tokenizer(texts).input_ids == ids
    kept = {"skip_special_tokens": True}
    assert tokenizer.batch_decode(ids, **kept) == policys.batch_decode(ids, **kept)
    if policys.chat_template:
        assert tokenizer.apply_chat_template(TURNS) == policys.apply_chat_template(TURNS)
    assert tokenizer.pad_token == CHOSEN.get(name, tokenizer.pad_token)


def test_the_padding_token_is_in_no_text_template_or_end_of_an_answer(saved):
    _, encoder, folder = saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = encoder.tokenizer(drawn_texts(300), split_special_tokens=True).input_ids
    if encoder.tokenizer.chat_template:
        read.append(encoder.tokenizer.apply_chat_template(TURNS, return_dict=False))
    assert tokenizer.pad_token_id not in {encoder.end_id, *(token for ids in read for token in ids)}


def test_the_padding_of_a_batch_of_prompts_changes_no_answer():
    """The padding is an end token, which may occur in a prompt."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, pad_token_id=0, eos_token_id=0, initializer_range=0.5, **size))
    draw = random.Random(0)
    prompts = [[draw.randrange(40) for _ in range(draw.randint(1, 20))] for _ in range(24)]
    alone = [generate_batch(model.eval(), [prompt], [0], [0, 1], GREEDY, 12)[0] for prompt in prompts]
    assert generate_batch(model, prompts, range(24), [0, 1], GREEDY, 12) == alone
    assert {len(answer.ids) for answer in alone} != {12}  # some end, the others go on beside their padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_scores_as_each_text_alone(saved, side):
    _, encoder, folder = saved
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [[*each, encoder.end_id] for each in encoder.tokenizer(drawn_texts(12)).input_ids]
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    assert batch.input_ids.max() < len(model.get_input_embeddings().weight)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch, position_ids=positions).logits
        alone = torch.cat([model(input_ids=torch.tensor([each])).logits for each in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
