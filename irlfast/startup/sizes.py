"""The size of a run's model, from its configuration alone. No weight is loaded or made."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention

from irlfast.common.files import InputError, find_path
from irlfast.common.messages import first_sentence, log
from irlfast.config import Config
from irlfast.data.store import Examples
from irlfast.models.configs import load_model_config
from irlfast.models.costs import Costs, costs_of
from irlfast.models.lora import add_lora
from irlfast.models.steady import recompute_layers
from irlfast.ops.common.heads import body_of, unwrapped

CAUSAL = "causal"
TOKENS = 128  # of the forward pass whose activations are counted


class Kept(NamedTuple):
    """Bytes of activations per token that the forward pass keeps for the backward pass."""

    layer: float  # per layer, kept until the backward pass
    recomputed: float  # of one layer, while it is recomputed; 0 without gradient_checkpointing
    rest: float  # outside the layers


NOTHING = Kept(0, 0, 0)


class Size(NamedTuple):
    parameters: int
    trained: int  # parameters that are trained: all, or those of the adapter
    layers: int
    hidden: int
    vocabulary: int = 0
    key_values: int = 0  # elements per token that a sampler keeps, of all layers
    costs: Costs = Costs(0, 0, 0)
    kept: Kept = NOTHING
    forward: int = 0  # operations per token of a forward pass through the layers


def model_size(config: Config, vocabulary: int | None = None, passes: bool = True) -> Size | None:
    """Return the model's size from its config alone; None where the config is out of reach.

    A new model has the ``vocabulary`` of its tokenizer. Without ``passes``, nothing of its passes is counted.
    """
    try:
        model_config = load_model_config(config)
    except InputError:
        if config.config_name or find_path(config.model_name_or_path or ""):
            raise
        return None
    if config.config_name and vocabulary:
        model_config.vocab_size = vocabulary
    model = empty_model(model_config, config)
    text = model_config.get_text_config()
    size = Size(count(model), count(model, trained=True), text.num_hidden_layers, text.hidden_size)
    if not passes:
        return size
    base = unwrapped(model)
    head = base.get_output_embeddings().weight
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size._replace(
        vocabulary=text.vocab_size,
        key_values=2 * text.num_hidden_layers * heads * head_size,
        costs=costs_of(base, head),
        kept=kept_or_nothing(model_config, config),
        forward=2 * costs_of(base.requires_grad_(True), head).token // 6,
    )


def empty_model(model_config: Any, config: Config) -> Any:
    """Make a model of ``model_config`` without memory for its weights; with an adapter, if ``use_peft`` is set."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=config.trust_remote_code, dtype=getattr(torch, config.dtype)
        )
        return add_lora(model, config, reward=False) if config.use_peft else model


def count(model: torch.nn.Module, trained: bool = False) -> int:
    """Return the number of parameters, or of those that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)


def mean_length(examples: Examples) -> float:
    """Return the mean number of tokens of a prompt and its answer."""
    return int(examples.lengths[:, :2].sum()) / len(examples)


# ---------------------------------------------------------------- activations


def kept_or_nothing(model_config: Any, config: Config) -> Kept:
    """Count the activations, and say so where a model's code cannot run without memory for its tensors."""
    try:
        return kept_activations(model_config, config)
    except Exception as error:  # of any class: models have code of their own
        log(f"activations of {model_config.model_type} are not counted in the estimate ({first_sentence(error)})")
        return NOTHING


def kept_activations(model_config: Any, config: Config) -> Kept:
    """Count what the forward pass keeps, on models of one layer and of two, as the configuration arranges them.

    The models run on tensors without memory, with the attention that keeps no matrix of scores.
    """
    one, two = (kept_bytes(model_config, config, layers, recompute=False) for layers in (1, 2))
    if not config.gradient_checkpointing:
        return Kept(two - one, 0, 2 * one - two)
    kept_one, kept_two = (kept_bytes(model_config, config, layers, recompute=True) for layers in (1, 2))
    return Kept(kept_two - kept_one, two - one, 2 * kept_one - kept_two)


def kept_bytes(model_config: Any, config: Config, layers: int, recompute: bool) -> float:
    """Return the bytes per token that a model of so many ``layers`` keeps for its backward pass."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface

    AttentionInterface.register(CAUSAL, causal_attention)  # and no mask function: it needs none
    model = empty_model(with_layers(model_config, layers), config)
    unwrapped(model).set_attn_implementation(CAUSAL)
    products = products_per_token(model) if config.gradient_checkpointing == "selective" else 0
    if recompute:
        recompute_layers(model, selective=config.gradient_checkpointing == "selective")
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model.to_empty(device="cpu")
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
        storages: dict[StorageWeakRef, torch.UntypedStorage] = {}  # a storage that is held keeps its address

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if (reference := StorageWeakRef(storage)) not in weights:
                storages[reference] = storage
            return tensor

        ids, positions = torch.zeros(1, TOKENS, dtype=torch.long), torch.arange(TOKENS)[None]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            body_of(unwrapped(model))(input_ids=ids, position_ids=positions, use_cache=False)
    noted = sum(storage.nbytes() for storage in storages.values()) / TOKENS
    return noted + (products * bytes_of(config) if recompute else 0)


def causal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return causal attention ``[B, L, heads, D]``, as a layer of Transformers calls it; windows change no memory."""
    grouped = query.shape[1] != key.shape[1]
    attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return attended.transpose(1, 2).contiguous(), None


def with_layers(model_config: Any, layers: int) -> Any:
    """Copy the config of a model, with so many layers, which are its first ones."""
    changed = copy.deepcopy(model_config)
    text = changed.get_text_config()
    text.num_hidden_layers = layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == model_config.get_text_config().num_hidden_layers:
            setattr(text, name, value[:layers])
    return changed


def products_per_token(model: torch.nn.Module) -> int:
    """Count the elements per token that the linear modules of a model's layers return."""
    import transformers

    head = unwrapped(model).get_output_embeddings()
    linear: Any = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    modules: list[Any] = [x for x in model.modules() if isinstance(x, linear) and x is not head]
    return sum(x.nf if hasattr(x, "nf") else x.out_features for x in modules)


def bytes_of(config: Config) -> int:
    """Return the bytes of a weight, or of another value of the run's dtype."""
    return 2 if config.dtype == "bfloat16" else 4
