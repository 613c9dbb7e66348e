"""Tokenizers: loaded, or trained on the run's own texts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from irlfast.common.files import find_path
from irlfast.common.messages import explain_errors
from irlfast.config import Config

END_TOKEN = "<|endoftext|>"


def load_tokenizer(config: Config, texts: Iterable[str]) -> Any:
    """Load the run's tokenizer, or train one on ``texts`` if ``train_tokenizer`` is set.

    Raises:
        InputError: Transformers cannot load the tokenizer.
    """
    import transformers

    if config.train_tokenizer:
        return train_tokenizer(texts, config.train_tokenizer)
    name = config.tokenizer_name_or_path or config.model_name_or_path
    assert name
    with explain_errors(f"tokenizer {name}: cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(find_path(name) or name),
            revision=config.model_revision if name == config.model_name_or_path else "main",
            trust_remote_code=config.trust_remote_code,
        )
        tokenizer("a")  # hostile settings are met here, before a row
        return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer of ``vocabulary`` tokens: it can encode any text."""
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
    return wrapped(tokenizer)


def load_trained(file: Path) -> Any:
    """Load a tokenizer that :func:`train_tokenizer` made, from the file of its ``backend_tokenizer``."""
    from tokenizers import Tokenizer

    return wrapped(Tokenizer.from_file(str(file)))


def wrapped(tokenizer: Any) -> Any:
    """Make a tokenizer of Transformers of one of the library ``tokenizers``."""
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=END_TOKEN, clean_up_tokenization_spaces=False
    )


def vocabulary_size(tokenizer: Any) -> int:
    """Return how many embedding rows a tokenizer needs. Ids may have gaps, which ``len(tokenizer)`` does not count."""
    return 1 + max(tokenizer.get_vocab().values())


def unused_ids(tokenizer: Any, rows: int) -> list[int]:
    """Return the ids below ``rows`` that stand for no token, because the embedding was padded or ids have gaps."""
    return sorted({*range(rows)} - {*tokenizer.get_vocab().values()})
