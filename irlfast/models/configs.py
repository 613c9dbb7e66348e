"""Facts about a model that its config states, so that its weights need not be loaded."""

from pathlib import Path
from typing import Any

from irlfast.common.files import InputError
from irlfast.common.messages import explain_errors
from irlfast.config import Config
from irlfast.config.types import shown
from irlfast.models.lora import base_and_adapter, revision_of

SIZES = {  # of a language model's config, and the largest that are no mistakes
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**6,
    "max_position_embeddings": 10**9,
}


def load_model_config(config: Config, name: Path | str | None = None) -> Any:
    """Load the Transformers config of the model ``name``; without a name, of the run's own model.

    Raises:
        InputError: Transformers finds no config there, or does not know the architecture.
    """
    import transformers

    key = "config_name" if config.config_name else "model_name_or_path"
    given = name or getattr(config, key)
    base, _ = base_and_adapter(given)
    with explain_errors(f"{key} {base}: not a Transformers config"):
        model_config = transformers.AutoConfig.from_pretrained(
            base, revision=revision_of(given, config), trust_remote_code=config.trust_remote_code
        )
        check_sizes(f"{key} {base}", model_config.get_text_config())
    return model_config


def building_options(config: Config) -> dict[str, Any]:
    """Return the options with which Transformers makes every model of a run."""
    import torch

    return {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": None if config.attn_implementation == "auto" else config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }


def check_sizes(what: str, text_config: Any) -> None:
    """Check that the sizes and the dtype of a language model are ones that a model can have, before it is built.

    Raises:
        InputError: one is not; the message begins with ``what``.
    """
    import torch

    for name, most in SIZES.items():
        size = getattr(text_config, name, None)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most):
            raise InputError(f"{what}: found {name} {shown(size)}, expected a whole number from 1 to {most:,}")
    dtype = getattr(text_config, "dtype", None)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"{what}: found dtype {shown(dtype)}, expected the name of one, such as float32 or bfloat16")


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
    with explain_errors(f"model {name}: its generation_config.json cannot be read"):
        try:
            end_tokens.append(transformers.GenerationConfig.from_pretrained(name, revision=revision).eos_token_id)
        except OSError:  # most models have no generation config
            if Path(name, "generation_config.json").exists():
                raise
    tokens = [token for ids in end_tokens for token in (ids if isinstance(ids, list) else [ids]) if token is not None]
    wrong = [token for token in tokens if not isinstance(token, int)]
    if wrong:
        raise InputError(f"model {name}: found the eos_token_id {shown(wrong[0])}, expected ids")
    return sorted({*tokens})


def attention_head_size(model: Any) -> int:
    """Return the number of elements in one attention head's query."""
    text_config = model.config.get_text_config()
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
