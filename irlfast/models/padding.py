"""A padding token that nothing else uses, for reward models.

A classifier of Transformers reads its logit at the last token that is no padding, and a tokenizer finds its padding in
texts before it splits them: padding that a text, a template or an answer's end has would change both.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor

from irlfast.data.encoding import Encoder

NAMES = (r"\W*((finetune_)?(right|left)_)?pad(ding)?(_id|_token)?\W*", r".*(reserved|unused).*", r"\W*unk\W*")
PLANES = "".join(map(chr, [*range(32, 127), *range(128, 0xD800, 61), *range(0xE000, 0x20000, 997)]))  # of Unicode


def padded_apart(model: Any, encoder: Encoder, state: dict[str, Tensor]) -> Any:
    """The tokenizer with such a padding token, of which the model's configuration has the id.

    The token is the tokenizer's own, a special token that is kept for later, or else a new one; where the embedding in
    ``state`` has no row for a new token, it gets one of zeros.
    """
    tokenizer = copy.deepcopy(encoder.tokenizer)
    text_config = model.config.get_text_config()
    name = unused_token(tokenizer, encoder)
    if name is None:
        known = tokenizer.get_vocab()
        name = "<|pad|>" if "<|pad|>" not in known else f"<|pad_{len(known)}|>"
        tokenizer.add_special_tokens({"pad_token": name})
    tokenizer.pad_token = name
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    weight = state[f"{embedding}.weight"]
    missing = tokenizer.pad_token_id + 1 - len(weight)
    if missing > 0:
        state[f"{embedding}.weight"] = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
        text_config.vocab_size = tokenizer.pad_token_id + 1
    text_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def unused_token(tokenizer: Any, encoder: Encoder) -> str | None:
    """The first special token for padding or for later that neither texts nor templates nor ends of answers have."""
    ends = {*encoder.ends, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id}
    templates = str(tokenizer.chat_template)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = [name for pattern in NAMES for name in special if re.fullmatch(pattern, name, re.IGNORECASE)]
    for name in filter(None, (tokenizer.pad_token, *named)):
        token = tokenizer.convert_tokens_to_ids(name)
        if token not in ends and name not in templates and not in_texts(token, tokenizer):
            return name
    return None


def in_texts(token: int, tokenizer: Any) -> bool:
    """Whether a text without special tokens may have this token: the text that it stands for, or any characters."""
    own = tokenizer.decode([token])
    texts = tokenizer([own, f"a{own}", PLANES], add_special_tokens=False, split_special_tokens=True)
    return any(token in ids for ids in texts.input_ids)
