"""Models and tokenizers: loaded, or built small from a config."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.config import Config
from irlfast.files import InputError, find, write

END_TOKEN = "<|endoftext|>"


# ---------------------------------------------------------------- tokenizers


def load_tokenizer(config: Config, texts: list[str]) -> Any:
    """The run's tokenizer; ``texts`` train one where ``train_tokenizer`` asks for it."""
    import transformers

    if config.train_tokenizer:
        return train_tokenizer(texts, config.train_tokenizer)
    name = config.tokenizer_name_or_path or config.model_name_or_path
    assert name
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(find(name) or name), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {name}: cannot be loaded ({first_sentence(error)})") from error


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer: every text has token ids, and frequent strings one each."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=END_TOKEN, clean_up_tokenization_spaces=False
    )


# ---------------------------------------------------------------- models


def build_model(config: Config, tokenizer: Any, folder: Path) -> None:
    """Write a model with new weights (seeded) and its tokenizer, as ``config_name`` describes it."""
    import transformers

    model_config = load_model_config(config)
    model_config.vocab_size = len(tokenizer)
    model_config.bos_token_id, model_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(config.seed)
    model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model = model.to(getattr(torch, config.dtype))
    write(folder, lambda temporary: save_pretrained(temporary, model, tokenizer))


def load_model_config(config: Config) -> Any:
    """The architecture of the run's model.

    Raises:
        InputError: where there is none that Transformers knows.
    """
    import transformers

    key = "config_name" if config.config_name else "model_name_or_path"
    name = str(getattr(config, key))
    try:
        return transformers.AutoConfig.from_pretrained(
            str(find(name) or name), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{key} {name}: not a Transformers config ({first_sentence(error)})") from error


def save_pretrained(folder: Path, model: Any, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def load_model(name: str | Path, config: Config) -> Any:
    """A causal language model in the run's dtype, dropout off, on the CPU.

    Raises:
        InputError: where the folder or hub name has no weights that Transformers can load.
    """
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(find(str(name)) or name),
            dtype=getattr(torch, config.dtype),
            attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model {name}: cannot be loaded ({first_sentence(error)})") from error
    return without_dropout(model)


def without_dropout(model: Any) -> Any:
    """Dropout would make the policy differ from the reference it starts as, and a resumed run from an unbroken one."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    return model


def first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0]
