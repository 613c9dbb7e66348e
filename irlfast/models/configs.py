"""Facts about a model that its config states, so that its weights need not be loaded."""

import contextlib
from pathlib import Path
from typing import Any

from irlfast.common.files import InputError
from irlfast.common.messages import first_sentence
from irlfast.config import Config
from irlfast.models.lora import base_and_adapter, revision_of


def load_model_config(config: Config, name: Path | str | None = None) -> Any:
    """Load the Transformers config of the model ``name``; without a name, of the run's own model.

    Raises:
        InputError: Transformers finds no config there, or does not know the architecture.
    """
    import transformers

    key = "config_name" if config.config_name else "model_name_or_path"
    given = name or getattr(config, key)
    base, _ = base_and_adapter(given)
    try:
        return transformers.AutoConfig.from_pretrained(
            base, revision=revision_of(given, config), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{key} {base}: not a Transformers config ({first_sentence(error)})") from error


def embedding_rows(config: Config, name: Path | str | None = None) -> int:
    """Return how many rows the token embedding of a model has; without a ``name``, of the run's own model."""
    return load_model_config(config, name).get_text_config().vocab_size


def stop_tokens(config: Config) -> list[int]:
    """Return the ids that the given model's config and generation config name as end tokens."""
    import transformers

    if not config.model_name_or_path:
        return []
    name, _ = base_and_adapter(config.model_name_or_path)
    revision = revision_of(config.model_name_or_path, config)
    end_tokens = [load_model_config(config).get_text_config().eos_token_id]  # each None, an id, or a list of ids
    with contextlib.suppress(OSError):  # most models have no generation config
        end_tokens.append(transformers.GenerationConfig.from_pretrained(name, revision=revision).eos_token_id)
    lists = [ids if isinstance(ids, list) else [ids] for ids in end_tokens]
    return sorted({token for ids in lists for token in ids if token is not None})


def attention_head_size(model: Any) -> int:
    """Return the number of elements in one attention head's query."""
    text_config = model.config.get_text_config()
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
