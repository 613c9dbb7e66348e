"""Load and save policies and reward models. A reward model is a language model's body under another head."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.common.files import InputError
from irlfast.common.messages import first_sentence, log_once
from irlfast.config import Config
from irlfast.models.lora import add_lora, base_and_adapter, has_adapter, load_lora, revision_of
from irlfast.ops.common.heads import unwrapped


def load_model(name: str | Path, config: Config, heads: int = 0, in_4bit: bool = False) -> Any:
    """Load a language model, or a reward model with ``heads``, in the run's dtype, in ``eval()``, on the CPU.

    The folder of an adapter (:mod:`irlfast.models.lora`) gives the adapter's base with the adapter on it. ``in_4bit``
    quantises the weights of the layers by bitsandbytes, on this process's GPU if there is one.

    A reward model is its family's ``AutoModelForSequenceClassification``. A language model that is loaded as one gets
    new heads (seeded); a saved reward model keeps its heads.

    Raises:
        InputError: Transformers cannot load the folder or hub name, or the checkpoint lacks tensors of the model.
    """
    import transformers

    base, adapter = base_and_adapter(name)
    kind: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {}
    if heads:
        torch.manual_seed(config.seed)
        kind = transformers.AutoModelForSequenceClassification
        options = {"num_labels": heads}
    if in_4bit:
        options["quantization_config"] = quantization_settings(config, skip=["score"] if heads else None)
    try:
        model, report = kind.from_pretrained(
            base,
            revision=revision_of(name, config),
            output_loading_info=True,
            dtype=getattr(torch, config.dtype),
            attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"model {base}: cannot be loaded ({first_sentence(error)})") from error
    check_none_missing(base, model, report["missing_keys"])
    log_left_out(base, model, report["unexpected_keys"], revision_of(name, config))
    if in_4bit:
        keep_4bit_layout(model)
    if adapter:
        model = load_lora(model, adapter, reward=bool(heads))
    return model.eval()


def load_to_train(
    name: Path | str, config: Config, *, reward: dict[str, Any] | None = None, in_4bit: bool = False
) -> Any:
    """Load a model as a phase begins to train it: with a new adapter if ``use_peft`` asks for one and it has none.

    ``reward`` makes it a reward model, and says how the reward is read from its heads (see
    :func:`irlfast.sampling.rewards.head_rewards`); ``reward_frozen_layers`` are frozen then.
    """
    outputs = config.reward_heads * (2 if reward and reward.get("variance") else 1)
    model = load_model(name, config, outputs if reward else 0, in_4bit)
    if config.use_peft and not has_adapter(model):
        model = add_lora(model, config, reward=bool(reward))
    if reward:
        model.config.irlfast_reward = reward
        freeze_layers(model, config.reward_frozen_layers)
    return model


def save_pretrained(folder: Path, model: Any, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
    """Save a model and its tokenizer in Hugging Face's format, with the tensors of ``state`` if given."""
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def is_reward_model(model: Any) -> bool:
    return type(unwrapped(model)).__name__.endswith("ForSequenceClassification")


def freeze_layers(model: Any, count: int) -> None:
    """Freeze a model's embedding and its first ``count`` layers. If these are all layers, freeze the whole body."""
    if not count:
        return
    body = unwrapped(model).base_model
    layers = model.config.get_text_config().num_hidden_layers
    stack = next(m for m in body.children() if isinstance(m, torch.nn.ModuleList) and len(m) == layers)
    frozen = [body] if count == layers else [model.get_input_embeddings(), *stack[:count]]
    for module in frozen:
        module.requires_grad_(False)


# ---------------------------------------------------------------- checkpoints that do not match the model


def check_none_missing(name: str, model: Any, missing: set[str]) -> None:
    """Check that the checkpoint has all tensors of the model, except for the heads of a new reward model.

    Transformers gives ``missing`` tensors random values.

    Raises:
        InputError: the checkpoint lacks a tensor.
    """
    others = sorted(key for key in missing if not (is_reward_model(model) and key.startswith("score.")))
    if others:
        raise InputError(
            f"model {name}: found no {others[0]} ({len(others)} tensors missing), expected all of "
            f"{type(model).__name__}"
        )


def log_left_out(name: str, model: Any, unexpected: set[str], revision: str) -> None:
    """Log which tensors of a language model's checkpoint the model has no place for.

    Transformers reports some of them as ``unexpected``; its classes list the names of others, which it ignores.
    """
    if is_reward_model(model):  # made from a language model, whose LM head it leaves out on purpose
        return
    from transformers.utils import cached_file

    folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    not_loaded = tensor_names(folder) - model.state_dict().keys()
    left_out = {key for key in not_loaded if any(pattern.search(key) for pattern in ignored)} | unexpected
    if left_out:
        log_once(
            f"model {name}: {type(model).__name__} has no place for {len(left_out)} tensors of its checkpoint, such as "
            f"{min(left_out)}; they are not trained, and not in final/"
        )


def tensor_names(folder: Path) -> set[str]:
    """Return the names of all tensors in a folder's safetensors files; none if its checkpoint has another format."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names.update(tensors.keys())
    return names


# ---------------------------------------------------------------- 4 bits


def quantization_settings(config: Config, skip: list[str] | None) -> Any:
    """Return QLoRA's settings (arXiv 2305.14314) from TRL's keys; modules to ``skip`` (default: LM head) stay whole."""
    import transformers

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=skip,
    )


def keep_4bit_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking the weights for inference, on a CPU with AVX512-BF16.

    bitsandbytes repacks a layer when it first runs without a gradient, as when a model is checked. From then on no
    gradient flows through the layer, and nothing says so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
