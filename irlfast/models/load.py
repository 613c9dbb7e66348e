"""Models and tokenizers: loaded, or built small from a config; reward models are policies with another head."""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.common.files import InputError, find_path, write
from irlfast.common.messages import log_once
from irlfast.config import Config
from irlfast.models.lora import base_and_adapter, load_lora, revision
from irlfast.ops import Head, lm_head
from irlfast.ops.common.heads import score_head, unwrapped

END_TOKEN = "<|endoftext|>"


# ---------------------------------------------------------------- tokenizers


def load_tokenizer(config: Config, texts: Iterable[str]) -> Any:
    """The run's tokenizer; ``texts`` train one where ``train_tokenizer`` asks for it."""
    import transformers

    if config.train_tokenizer:
        return train_tokenizer(texts, config.train_tokenizer)
    name = config.tokenizer_name_or_path or config.model_name_or_path
    assert name
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(find_path(name) or name),
            revision=config.model_revision if name == config.model_name_or_path else "main",
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {name}: cannot be loaded ({first_sentence(error)})") from error


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
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


def vocabulary_size(tokenizer: Any) -> int:
    """Embeddings that a tokenizer asks for: ids may have gaps, and ``len`` does not count them."""
    return 1 + max(tokenizer.get_vocab().values())


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


@torch.no_grad()
def resize_model(config: Config, tokenizer: Any, folder: Path) -> None:
    """Write the given model with its tokenizer and an embedding for each token; new ones are the mean of the others.

    Raises:
        InputError: the model has more tensors than those of embedding and LM head that would have to grow.
    """
    model = load_model(str(config.model_name_or_path), config)
    tokens, rows = vocabulary_size(tokenizer), rows_of(config)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for tensor in (module.weight, getattr(module, "bias", None)):
            if tensor is not None:
                tensor[rows:] = tensor[:rows].float().mean(0)
    try:
        model(input_ids=torch.tensor([[tokens - 1]]))
    except (IndexError, RuntimeError) as error:
        raise InputError(f"resize_embeddings: {type(model).__name__} does not run with {tokens:,} tokens") from error
    write(folder, lambda temporary: save_pretrained(temporary, model, tokenizer))


def rows_of(config: Config, name: Path | str | None = None) -> int:
    """Embeddings of a model, or of the base of an adapter; without a ``name``, of the run's model."""
    return load_model_config(config, name).get_text_config().vocab_size


def load_model_config(config: Config, name: Path | str | None = None) -> Any:
    """The architecture of a model; without a ``name``, of the run's model.

    Raises:
        InputError: where there is none that Transformers knows.
    """
    import transformers

    key = "config_name" if config.config_name else "model_name_or_path"
    given = name or getattr(config, key)
    base, _ = base_and_adapter(given)
    try:
        return transformers.AutoConfig.from_pretrained(
            base, revision=revision(given, config), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{key} {base}: not a Transformers config ({first_sentence(error)})") from error


def stop_tokens(config: Config) -> list[int]:
    """The tokens that end an answer by the word of the model's own config and generation config."""
    import transformers

    if not config.model_name_or_path:
        return []
    name, _ = base_and_adapter(config.model_name_or_path)
    chosen = revision(config.model_name_or_path, config)
    found = [load_model_config(config).get_text_config().eos_token_id]
    with contextlib.suppress(OSError):  # most models have no generation config
        found.append(transformers.GenerationConfig.from_pretrained(name, revision=chosen).eos_token_id)
    flat = [ids if isinstance(ids, list) else [ids] for ids in found]
    return sorted({token for ids in flat for token in ids if token is not None})


def no_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """The ids below ``vocabulary`` that stand for no token, as rows of an embedding that was padded."""
    return sorted({*range(vocabulary)} - {*tokenizer.get_vocab().values()})


def save_pretrained(folder: Path, model: Any, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def load_model(name: str | Path, config: Config, heads: int = 0, in_4bit: bool = False) -> Any:
    """A causal language model in the run's dtype, in ``eval()``, on the CPU; with ``heads``, a reward model.

    With ``in_4bit`` the weights of its layers are quantised by bitsandbytes, on this process's GPU where there is one.
    The folder of an adapter (:mod:`irlfast.models.lora`) gives its base with the adapter on it.

    A reward model is its family's ``AutoModelForSequenceClassification``: one made of a language model gets new heads
    (seeded), one that was saved keeps its own.

    Raises:
        InputError: where the folder or hub name has no weights that Transformers can load, or not all of them.
    """
    import transformers

    base, adapter = base_and_adapter(name)
    kind: Any = transformers.AutoModelForCausalLM
    own: dict[str, Any] = {}
    if heads:
        torch.manual_seed(config.seed)
        kind = transformers.AutoModelForSequenceClassification
        own = {"num_labels": heads}
    if in_4bit:
        own["quantization_config"] = quantisation(config, skip=["score"] if heads else None)
    try:
        model, found = kind.from_pretrained(
            base,
            revision=revision(name, config),
            output_loading_info=True,
            dtype=getattr(torch, config.dtype),
            attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            **own,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"model {base}: cannot be loaded ({first_sentence(error)})") from error
    check_loaded(base, model, found["missing_keys"])
    log_left_out(base, model, found["unexpected_keys"], revision(name, config))
    if in_4bit:
        keep_4bit_layout(model)
    if adapter:
        model = load_lora(model, adapter, reward=bool(heads))
    return model.eval()


def check_loaded(name: str, model: Any, missing: set[str]) -> None:
    """Make sure that no weights but a new reward model's heads are random.

    Raises:
        InputError: tensors of the model are ``missing`` from the checkpoint.
    """
    others = sorted(key for key in missing if not (is_reward(model) and key.startswith("score.")))
    if others:
        raise InputError(
            f"model {name}: found no {others[0]} ({len(others)} tensors missing), expected all of "
            f"{type(model).__name__}"
        )


def log_left_out(name: str, model: Any, unexpected: set[str], at: str) -> None:
    """Name the tensors of a language model's checkpoint that the model has no place for, ``unexpected`` or known so."""
    if is_reward(model):  # of a language model it takes all but the head
        return
    from transformers.utils import cached_file

    folder, own = Path(str(cached_file(name, "config.json", revision=at))).parent, model.state_dict().keys()
    known = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    left_out = {key for key in tensor_names(folder) - own if any(pattern.search(key) for pattern in known)} | unexpected
    if left_out:
        log_once(
            f"model {name}: {type(model).__name__} has no place for {len(left_out)} tensors of its checkpoint, such as "
            f"{min(left_out)}; they are not trained, and not in final/"
        )


def tensor_names(folder: Path) -> set[str]:
    """Of the checkpoint in a folder; none where it is no safetensors file."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names.update(tensors.keys())
    return names


def keep_4bit_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking weights on a CPU that has AVX512-BF16.

    It does so for inference when they are first used without a gradient, as to check a model; no gradient flows through
    them from then on, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantisation(config: Config, skip: list[str] | None) -> Any:
    """QLoRA's (arXiv 2305.14314), as TRL's keys say; modules to ``skip`` stay whole (by default the LM head)."""
    import transformers

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=skip,
    )


def head_size(model: Any) -> int:
    """Elements of an attention head's queries."""
    text = model.config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def is_reward(model: Any) -> bool:
    return type(unwrapped(model)).__name__.endswith("ForSequenceClassification")


def head_of(model: Any) -> Head:
    """What a model's last hidden states meet: a language model's LM head, a reward model's heads ``[M, H]``.

    Raises:
        ValueError: the model's logits are not that head's.
    """
    return score_head(model) if is_reward(model) else lm_head(model)


def freeze(model: Any, layers: int) -> None:
    """Let a model's embeddings and first ``layers`` stay as they are, or with all of its layers the whole backbone."""
    if not layers:
        return
    base = unwrapped(model).base_model
    count = model.config.get_text_config().num_hidden_layers
    stack = next(m for m in base.children() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    frozen = [base] if layers == count else [model.get_input_embeddings(), *stack[:layers]]
    for module in frozen:
        module.requires_grad_(False)


def first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0]
