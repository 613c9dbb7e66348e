"""The LM head of a Transformers model as the operations take it, found by the model's own forward."""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZES = (2**-10, 1.0, 32.0, 2**14)  # of the probe's numbers: small ones show the scale, large ones any soft-cap
EXACT = 1e-5  # relative: the probe computes in fp32


class Head(NamedTuple):
    """What turns a hidden row into logits: ``softcap(scale * (hidden @ weight.T + bias))``."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    logit_softcap: float | None


def lm_head(model: Any) -> Head:
    """The LM head of a causal Transformers model, with the scale and soft-cap that the model's own logits have.

    The first call for a model probes it (:func:`probe`); later calls remember the result.

    Raises:
        ValueError: the logits are another function of the last hidden state.
    """
    model = unwrapped(model)
    return head_at(model, model.get_output_embeddings())


def score_head(model: Any) -> Head:
    """The heads ``[M, H]`` of a Transformers model for sequence classification that reads one token by a ``score``.

    Raises:
        ValueError: its logits are something else than ``score``'s products with that token's last hidden state.
    """
    model = unwrapped(model)
    return head_at(model, getattr(model, "score", None))


def unwrapped(model: Any) -> Any:
    """The model inside PEFT's wrapper, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


PROBED: weakref.WeakKeyDictionary[Any, tuple[float, float | None]] = weakref.WeakKeyDictionary()


def body_of(model: Any) -> Any:
    """The model under the LM head. Llama 4 does not name it as others do, but has it at the usual place."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def head_at(model: Any, output: Any) -> Head:
    """Return the ``output`` module of ``model`` as a head."""
    module = linear_module(model, output)
    return Head(module.weight, module.bias, *scale_and_softcap(model, module))


def linear_module(model: Any, output: Any) -> torch.nn.Linear:
    """Return the linear layer that computes the logits of ``model``: its ``output`` module, or PEFT's trained copy.

    Raises:
        ValueError: the module is no ``torch.nn.Linear``.
    """
    if hasattr(output, "modules_to_save"):  # PEFT's wrapper around a copy that is trained beside an adapter
        output = output.modules_to_save[output.active_adapter]
    if not isinstance(output, torch.nn.Linear):
        raise ValueError(f"{type(model).__name__}: found head {type(output).__name__}, expected torch.nn.Linear")
    return output


def scale_and_softcap(model: Any, output: torch.nn.Linear) -> tuple[float, float | None]:
    """Return the scale and soft-cap of a model's logits. The first call for a model probes it; later ones remember.

    Raises:
        ValueError: the logits are another function of the last hidden state.
    """
    name = type(model).__name__
    if model not in PROBED:
        try:
            PROBED[model] = probe(model, output)
        except ValueError as error:
            raise ValueError(f"{name}: its head cannot be used by itself: {error}") from error
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:  # raised by the model
            raise ValueError(f"{name}: its head cannot be probed in fp32: its forward raises {error!r}") from error
    return PROBED[model]


@torch.enable_grad()
def probe(model: Any, output: torch.nn.Linear) -> tuple[float, float | None]:
    """The scale and soft-cap of a model's logits, in fp32 whatever the model's dtype, and without its weights.

    For the time of the probe, the model's body returns drawn hidden states and its head drawn products. What the
    model's own forward hands to the head shows what it does before, and the logits that it returns show what it does
    after.

    Raises:
        ValueError: it does more than to scale and to soft-cap.
    """
    body = body_of(model)
    decoder = body if model.get_decoder() is model else model.get_decoder()
    if body is model:
        raise ValueError("found no base model, whose last hidden state the head reads")
    hidden, products = drawn(output.in_features).to(model.device), drawn(output.out_features).to(model.device)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.full((1, len(SIZES)), int(padding == 0), dtype=torch.long, device=model.device)
    read: list[Tensor] = []

    def states(*_: Any, **__: Any) -> Output:
        return Output([hidden])

    def product(given: Tensor) -> Tensor:
        read.append(given)
        return products

    with replacing(decoder, states), replacing(body, states), replacing(output, product):
        logits = model(input_ids=ids, return_dict=True).logits
    if len(read) != 1 or read[0].shape != hidden.shape:
        raise ValueError("the logits are not one product of the head with the last hidden state")
    if read[0].requires_grad or logits.requires_grad:
        raise ValueError("a trained weight beside the head stands between the last hidden state and the logits")
    if logits.dim() == 2:  # a classifier's, of the last token
        products, logits = products[:, -1:], logits[None]
    before, after = fit(hidden, read[0]), fit(products, logits)
    if not before or before[1]:
        raise ValueError("the head reads something else than the last hidden state, scaled")
    if not after:
        raise ValueError("the logits are something else than the head's products, scaled and soft-capped")
    if output.bias is not None and before[0] != 1:
        raise ValueError("the last hidden state is scaled, and the head has a bias")
    return before[0] * after[0], after[1]


def drawn(width: int) -> Tensor:
    """``[1, len(SIZES), width]`` fp32, of numbers that bf16 and fp16 hold exactly, as some models cast to these."""
    generator = torch.Generator().manual_seed(0)
    eighths = torch.randint(8, 16, (len(SIZES), width), generator=generator) / 16
    signs = torch.randint(0, 2, (len(SIZES), width), generator=generator) * 2 - 1
    return (signs * eighths * torch.tensor(SIZES)[:, None])[None]


@contextlib.contextmanager
def replacing(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Within it, ``module`` computes ``forward`` instead."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class Output(tuple):
    """What a body returns: hidden states, by their place or name, and nothing else."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def fit(given: Tensor, found: Tensor) -> tuple[float, float | None] | None:
    """The scale and soft-cap that make ``found`` of ``given``, rows of :data:`SIZES`; None where there are none."""
    if given.shape != found.shape:
        return None
    given, found = given[0].double(), found[0].double()
    scale, cap = short((found[0] / given[0]).median().item()), None
    expected = scale * given
    if not torch.allclose(found, expected, rtol=EXACT, atol=0):
        cap = short(found.abs().max().item())
        expected = cap * torch.tanh(expected / cap)
    return (scale, cap) if torch.allclose(found, expected, rtol=EXACT, atol=0) else None


def short(value: float) -> float:
    """The number of few digits that fp32 has rounded to ``value``, or that itself."""
    rounded = float(f"{value:.6g}")
    return rounded if math.isclose(rounded, value, rel_tol=1e-7) else value
