"""Load and save policies and reward models. A reward model is a language model's body under another head."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.common.messages import explain_errors, log, log_once
from irlfast.common.tensors import is_finite
from irlfast.config import Config
from irlfast.config.deepspeed import zero_stage
from irlfast.models.configs import building_options
from irlfast.models.lora import add_lora, base_and_adapter, has_adapter, load_lora, revision_of
from irlfast.models.saved import check_saved, is_converted
from irlfast.models.split import load_split, refuse_not_finite, stored_tensors
from irlfast.ops.common.heads import unwrapped

NAMED = 5  # missing tensors that an error names


def load_model(
    name: str | Path,
    config: Config,
    heads: int = 0,
    in_4bit: bool = False,
    may_lack: bool = False,
    split: bool = False,
) -> Any:
    """Load a language model, or a reward model with ``heads``, in the run's dtype, in ``eval()``, on the CPU.

    The folder of an adapter (:mod:`irlfast.models.lora`) gives the adapter's base with the adapter on it. ``in_4bit``
    quantises the weights of the layers by bitsandbytes, on this process's GPU if there is one.

    A reward model is its family's ``AutoModelForSequenceClassification``. A language model that is loaded as one gets
    new heads (seeded); a saved reward model keeps its heads. With ``may_lack``, the checkpoint may lack tensors, which
    get new values, too. With ``split``, ZeRO-3 splits the weights while they are loaded (:mod:`irlfast.models.split`).

    Raises:
        InputError: Transformers cannot load the folder or hub name, the checkpoint lacks tensors of the model, or a
            weight is not finite.
    """
    base, adapter = base_and_adapter(name)
    revision = revision_of(name, config)
    with explain_errors(f"model {base}: cannot be loaded"):
        model, unexpected = load_split(base, revision, config, heads) if split else (None, set())
        if model is None:
            model, unexpected = load_whole(base, revision, config, heads, in_4bit, may_lack)
        log_left_out(base, model, unexpected, revision)
    if in_4bit:
        keep_4bit_layout(model)
    if adapter:
        model = load_lora(model, adapter, reward=bool(heads))
    return model.eval()


def load_whole(
    base: str, revision: str, config: Config, heads: int, in_4bit: bool, may_lack: bool
) -> tuple[Any, set[str]]:
    """Load a whole model, and return the names of the tensors that it has no place for; see :func:`load_model`."""
    import transformers

    kind: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {}
    if heads or may_lack:
        torch.manual_seed(config.seed)
    if heads:
        kind = transformers.AutoModelForSequenceClassification
        options = {"num_labels": heads}
    if in_4bit:
        options["quantization_config"] = quantization_settings(config, skip=["score"] if heads else None)
    model, report = kind.from_pretrained(
        base,
        revision=revision,
        output_loading_info=True,
        **building_options(config),
        **options,
    )
    check_missing(base, model, report["missing_keys"], may_lack)
    check_finite(base, model)
    return model, report["unexpected_keys"]


def load_to_train(
    name: Path | str,
    config: Config,
    *,
    reward: dict[str, Any] | None = None,
    in_4bit: bool = False,
    loaded: Any = None,
) -> Any:
    """Load a model as a phase begins to train it: with a new adapter if ``use_peft`` asks for one and it has none.

    ``reward`` makes it a reward model, and says how the reward is read from its heads (see
    :func:`irlfast.sampling.rewards.head_rewards`); ``reward_frozen_layers`` are frozen then. A language model that is
    ``loaded`` already is not loaded again.
    """
    outputs = config.reward_heads * (2 if reward and reward.get("variance") else 1)
    model = loaded
    if model is None:
        model = load_model(
            name, config, outputs if reward else 0, in_4bit, split=not reward and is_run_split(config, in_4bit)
        )
    if config.use_peft and not has_adapter(model):
        model = add_lora(model, config, reward=bool(reward))
    if reward:
        model.config.irlfast_reward = reward
        freeze_layers(model, config.reward_frozen_layers)
    return model


def is_run_split(config: Config, in_4bit: bool) -> bool:
    """Return whether ZeRO-3 splits the models of a run among its processes, where they train or score."""
    return not in_4bit and dist.world_size() > 1 and zero_stage(config) == 3


def save_pretrained(folder: Path, model: Any, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
    """Save a model and its tokenizer in Hugging Face's format, with the tensors of ``state`` if given.

    Raises:
        OSError: the folder does not hold them afterwards.
    """
    model.should_save_on_this_rank = lambda wanted: wanted  # by default, Transformers writes in the main process alone
    model.save_pretrained(folder, state_dict=None if state is None else {**state})  # Transformers empties it
    tokenizer.save_pretrained(folder)
    written = model.state_dict() if state is None else state
    check_saved(folder, tokenizer, {} if is_converted(model) else written)


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


def check_missing(name: str, model: Any, missing: set[str], may_lack: bool = False) -> None:
    """Check that the checkpoint has all tensors of the model. A language model may lack the heads of a reward model.

    Transformers gives ``missing`` tensors random values. With ``may_lack``, their names are logged.

    Raises:
        InputError: the checkpoint lacks a tensor.
    """
    was_reward_model = any(kind.endswith("ForSequenceClassification") for kind in model.config.architectures or ())
    lacks_heads = is_reward_model(model) and not was_reward_model
    others = sorted(key for key in missing if not (lacks_heads and key.startswith("score.")))
    if not others:
        return
    if may_lack:
        log(f"model {name}: found no {', '.join(others)}: new, seeded values")
        return
    named = ", ".join(others[:NAMED]) + (", …" if len(others) > NAMED else "")
    raise InputError(
        f"model {name}: found no {named} ({len(others)} tensors missing), expected all of {type(model).__name__}, or "
        "allow_missing_weights: true for a model to start from"
    )


def check_finite(name: str, model: Any) -> None:
    """Check that all weights are finite.

    Raises:
        InputError: a weight is not; the message names the tensor.
    """
    weights = {key: x.detach() for key, x in model.named_parameters() if x.is_floating_point()}
    refuse_not_finite(name, [key for key, x in weights.items() if not is_finite(x)])


def log_left_out(name: str, model: Any, unexpected: set[str], revision: str) -> None:
    """Log which tensors of a language model's checkpoint the model has no place for.

    Transformers reports some of them as ``unexpected``; its classes list the names of others, which it ignores.
    """
    if is_reward_model(model):  # made from a language model, whose LM head it leaves out on purpose
        return
    from transformers.utils import cached_file

    folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    not_loaded = stored_tensors(folder).keys() - model.state_dict().keys()
    left_out = {key for key in not_loaded if any(pattern.search(key) for pattern in ignored)} | unexpected
    if left_out:
        log_once(
            f"model {name}: {type(model).__name__} has no place for {len(left_out)} tensors of its checkpoint, such as "
            f"{min(left_out)}; they are not trained, and not in final/"
        )


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
