"""Give a reward model a padding token that nothing else uses.

Transformers' classifiers read their logit at the last token that is not padding, and tokenizers look for the padding
token in a text before they split the text. So a padding token that occurs in a text, in a template or at the end of an
answer would change scores and token ids.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor

from irlfast.data.encoding import Encoder

# Names of special tokens that are meant for padding, or for later use, from the best to the last.
NAMES = (r"\W*((finetune_)?(right|left)_)?pad(ding)?(_id|_token)?\W*", r".*(reserved|unused).*", r"\W*unk\W*")
# One text with characters from all over Unicode.
CHARACTERS = "".join(map(chr, [*range(32, 127), *range(128, 0xD800, 61), *range(0xE000, 0x20000, 997)]))


def add_unique_padding(model: Any, encoder: Encoder, state: dict[str, Tensor]) -> Any:
    """Return a copy of the tokenizer with such a padding token, and write the token's id into the model's config.

    The token is the tokenizer's own padding token, a special token that is reserved for later use, or else a new one.
    If the embedding in ``state`` has no row for a new token, it gets rows of zeros.
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
    """Return the first padding or reserved token that no text, template or end of an answer has, or None."""
    ends = {*encoder.ends, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id}
    templates = str(tokenizer.chat_template)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = [name for pattern in NAMES for name in special if re.fullmatch(pattern, name, re.IGNORECASE)]
    for name in filter(None, (tokenizer.pad_token, *named)):
        token = tokenizer.convert_tokens_to_ids(name)
        if token not in ends and name not in templates and not occurs_in_texts(token, tokenizer):
            return name
    return None


def occurs_in_texts(token: int, tokenizer: Any) -> bool:
    """Return whether texts without special tokens can have this token; its own text and many characters are tried."""
    own = tokenizer.decode([token])
    texts = tokenizer([own, f"a{own}", CHARACTERS], add_special_tokens=False, split_special_tokens=True)
    return any(token in ids for ids in texts.input_ids)
