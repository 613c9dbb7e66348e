"""New models: one with random weights from a config, or a given one with more embedding rows or tensors."""

from pathlib import Path
from typing import Any

import torch

from irlfast.common.artefacts import keep
from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.models.configs import embedding_rows, load_model_config
from irlfast.models.load import load_model, save_pretrained
from irlfast.models.lora import base_and_adapter
from irlfast.models.tokenizers import vocabulary_size


def build_model(config: Config, tokenizer: Any, folder: Path) -> None:
    """Write a model with new, seeded weights and the architecture of ``config_name``, and its tokenizer."""
    import transformers

    model_config = load_model_config(config)
    model_config.vocab_size = len(tokenizer)
    model_config.bos_token_id, model_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(config.seed)
    model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model = model.to(getattr(torch, config.dtype))
    keep(folder, lambda temporary: save_pretrained(temporary, model, tokenizer))


def complete_model(config: Config, tokenizer: Any, folder: Path) -> None:
    """Write the given model with new, seeded values for the tensors that it lacks, and its tokenizer.

    Raises:
        InputError: the given model is an adapter.
    """
    given = str(config.model_name_or_path)
    if base_and_adapter(given)[1]:
        raise InputError(f"allow_missing_weights: found true with the adapter {given}; expected a whole model")
    model = load_model(given, config, may_lack=True)
    keep(folder, lambda temporary: save_pretrained(temporary, model, tokenizer))


@torch.no_grad()
def resize_model(config: Config, tokenizer: Any, folder: Path) -> None:
    """Write the given model with an embedding row for every token, and its tokenizer.

    Each new row of the embedding and of the LM head is the mean of the old rows.

    Raises:
        InputError: the model does not run with the new tokens, because other tensors would have to grow, too.
    """
    model = load_model(str(config.model_name_or_path), config, may_lack=config.allow_missing_weights)
    tokens, old_rows = vocabulary_size(tokenizer), embedding_rows(config)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for tensor in (module.weight, getattr(module, "bias", None)):
            if tensor is not None:
                tensor[old_rows:] = tensor[:old_rows].float().mean(0)
    try:
        model(input_ids=torch.tensor([[tokens - 1]]))
    except (IndexError, RuntimeError) as error:
        raise InputError(f"resize_embeddings: {type(model).__name__} does not run with {tokens:,} tokens") from error
    keep(folder, lambda temporary: save_pretrained(temporary, model, tokenizer))
