"""Chat templates as well-known models have them, each on a small tokenizer that works like that family's."""

# ruff: noqa: E501

import json
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# How Llama 3 and Qwen split a text into words: line ends stay with the white space before them.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = ["what is two and two? it is four", "user assistant system model", "    return yes\n\n", "Stop!!! <think>"] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED = LLAMA3.replace(
    "{{ bos_token }}",
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday is {{ strftime_now('%d %b %Y, %H:%M:%S') }}.<|eot_id|>",
)
ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    + ALTERNATING
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL_SPACE = (
    "{{ bos_token }}" + ALTERNATING + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}" + ALTERNATING + "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content %}"
    "{% if not thought and '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ said.lstrip('\n') }}"
    "{% else %}{{ said }}{% endif %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # QwQ
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant"
    "{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|><|START_RESPONSE|>"
    "{{ m.content }}<|END_RESPONSE|>{% else %}<|USER_TOKEN|>{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
NO_HEADER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"  # no generation prompt
)
NO_END = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"


class Kind(NamedTuple):
    template: str | None
    special: list[str]  # the last is the EOS
    end: str  # ends an answer
    bos: str | None = None
    adds_bos: bool = False
    metaspace: bool = False  # spaces become ▁, as in SentencePiece
    plain: tuple[str, ...] = ()  # added tokens that are not marked as special
    strips: bool = False  # its special tokens swallow the white space behind them


CHATML_TOKENS = ["<|im_start|>", "<|endoftext|>", "<|im_end|>"]
THINK = ("<think>", "</think>")
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eot_id|>"]
KINDS = {
    "ChatML": Kind(CHATML, CHATML_TOKENS, "<|im_end|>"),
    "default system prompt (Qwen 2.5)": Kind(QWEN25, CHATML_TOKENS, "<|im_end|>"),
    "marked by {% generation %}": Kind(MARKED, CHATML_TOKENS, "<|im_end|>"),
    "Llama 3": Kind(LLAMA3, LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>", adds_bos=True),
    "with a date": Kind(DATED, LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>", adds_bos=True),
    "Gemma": Kind(GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], "<end_of_turn>", "<bos>", True, True),
    "Mistral, with a space": Kind(MISTRAL_SPACE, ["<s>", "</s>"], "</s>", "<s>", True, True),
    "Mistral, without": Kind(MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"], "</s>", "<s>", True),
    "Zephyr": Kind(ZEPHYR, ["<s>", "</s>"], "</s>", "<s>", True, True),
    "Phi 3": Kind(
        PHI3, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"], "<|end|>", strips=True
    ),
    "DeepSeek R1": Kind(
        R1, ["<bos>", "<eos>"], "<eos>", "<bos>", True, plain=("<｜User｜>", "<｜Assistant｜>", *THINK)
    ),
    "Qwen 3": Kind(QWEN3, CHATML_TOKENS, "<|im_end|>", plain=THINK),
    "QwQ, which opens a thinking block": Kind(OPENED, CHATML_TOKENS, "<|im_end|>", plain=THINK),
    "gpt-oss, channels": Kind(
        CHANNELS, ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|endoftext|>", "<|return|>"], "<|return|>"
    ),
    "Command R": Kind(
        COMMAND_R,
        [
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
            "<|END_OF_TURN_TOKEN|>",
        ],
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        True,
    ),
    "without a generation prompt": Kind(NO_HEADER, CHATML_TOKENS, "<|im_end|>"),
    "without an end token": Kind(NO_END, ["<|endoftext|>"], "<|endoftext|>"),
    "none": Kind(None, ["<s>", "</s>"], "</s>", "<s>", True, True),
    "none, no BOS": Kind(None, ["<|endoftext|>"], "<|endoftext|>"),
}


def tokenizer_of(kind: Kind) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind.metaspace, unk_token="<unk>" if kind.metaspace else None))
    if kind.metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
    else:
        words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*(["<unk>"] if kind.metaspace else []), *kind.special]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special + (alphabet if kind.metaspace else []),
        initial_alphabet=[] if kind.metaspace else alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if kind.metaspace:
        tokenizer = without_added(tokenizer, alphabet)
    if kind.strips:
        tokenizer.add_special_tokens([AddedToken(token, rstrip=True, special=True) for token in kind.special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in kind.plain])
    if kind.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", special_tokens=[(kind.bos, tokenizer.token_to_id(kind.bos))]
        )
    names = {"eos_token": kind.special[-1]} | ({"bos_token": kind.bos} if kind.bos else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[token for token in kind.special if token not in names.values()],
        chat_template=kind.template,
        clean_up_tokenization_spaces=False,
        **names,
    )


def without_added(tokenizer: Tokenizer, tokens: list[str]) -> Tokenizer:
    """Return a copy in which ``tokens`` are only in the vocabulary: byte fallbacks must not match in a text."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(state))
