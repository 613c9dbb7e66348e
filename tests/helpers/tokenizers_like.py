"""Small tokenizers that work like those of well-known families, and their chat templates."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "What is the capital of France?",
    "The capital of France is Paris.",
    "### Instruction: a b c",
    "user assistant",
] * 4

ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def sentencepiece_like(specials: list[str], bos: str, eos: str, template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama's: words start with ▁, unknown characters become bytes, a text gets a BOS."""
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator(
        [text.replace(" ", "▁") for text in TEXT],
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *specials], show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    vocab = learned["vocab"] | {f"<0x{i:02X}>": len(learned["vocab"]) + i for i in range(256)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", *specials])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=[token for token in specials if token not in (bos, eos)],
        chat_template=template,
    )


def byte_level(specials: list[str], eos: str, template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer like GPT-NeoX's and Qwen's: byte-level, without a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        additional_special_tokens=[token for token in specials if token != eos],
        chat_template=template,
    )


def llama() -> PreTrainedTokenizerFast:
    return sentencepiece_like(["<s>", "</s>"], "<s>", "</s>", None)


def zephyr() -> PreTrainedTokenizerFast:
    return sentencepiece_like(["<s>", "</s>"], "<s>", "</s>", ZEPHYR)


def gemma() -> PreTrainedTokenizerFast:
    return sentencepiece_like(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", GEMMA)


def pythia() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(["<|endoftext|>"], "<|endoftext|>", None)
    tokenizer.bos_token = "<|endoftext|>"  # the tokenizer names it and never adds it
    return tokenizer


def qwen() -> PreTrainedTokenizerFast:
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", QWEN)


FAMILIES = {"llama": llama, "pythia": pythia, "qwen": qwen, "gemma": gemma, "zephyr": zephyr}
