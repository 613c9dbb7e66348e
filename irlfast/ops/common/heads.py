"""The LM head of a Transformers model as the operations take it, measured by a probe of the model's own forward."""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZES = (2**-10, 1.0, 32.0, 2**14)  # of the numbers in the probe: small ones show the scale, large ones any soft-cap
TOLERANCE = 1e-5  # relative: the probe computes in fp32


class Head(NamedTuple):
    """A linear head. Its logits are ``softcap(logit_scale · (hidden @ weightᵀ + bias))``."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    logit_softcap: float | None


def lm_head(model: Any) -> Head:
    """The LM head of a causal Transformers model, with the scale and soft-cap that the model's own logits have.

    The first call for a model probes it (:func:`probe`); later calls use the remembered result.

    Raises:
        ValueError: the logits are another function of the last hidden state.
    """
    model = unwrapped(model)
    return head_at(model, model.get_output_embeddings())


def score_head(model: Any) -> Head:
    """The M heads of a Transformers model for sequence classification, which is a ``score`` layer read at one token.

    Raises:
        ValueError: the logits are not ``score``'s products with this token's last hidden state.
    """
    model = unwrapped(model)
    return head_at(model, getattr(model, "score", None))


def unwrapped(model: Any) -> Any:
    """The model inside PEFT's wrapper; a model without the wrapper as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


PROBED: weakref.WeakKeyDictionary[Any, tuple[float, float | None]] = weakref.WeakKeyDictionary()


def body_of(model: Any) -> Any:
    """The model under the LM head. Llama 4 gives it no name, but has it at the usual attribute, ``model``."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def head_at(model: Any, output: Any) -> Head:
    """Return the ``output`` module of ``model`` as a head."""
    module = linear_module(model, output)
    return Head(module.weight, module.bias, *scale_and_softcap(model, module))


def linear_module(model: Any, output: Any) -> torch.nn.Linear:
    """Return the linear layer that computes the logits of ``model``: its ``output`` module, or PEFT's active copy.

    Raises:
        ValueError: the module is no ``torch.nn.Linear``.
    """
    if hasattr(output, "modules_to_save"):  # PEFT's wrapper around copies that are trained beside adapters
        active = [] if output.disable_adapters else output.active_adapters
        copies = [output.modules_to_save[name] for name in active if name in output.modules_to_save]
        output = copies[0] if copies else output.original_module
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
    """The scale and soft-cap of a model's logits, in fp32 for any dtype of the model, and without its weights.

    During the probe, the model's body returns random hidden states, and its head random products. The input that the
    forward passes to the head shows what the model does before the head; the logits show what it does after.

    Raises:
        ValueError: the model does more than to scale and to soft-cap.
    """
    body = body_of(model)
    decoder = body if model.get_decoder() is model else model.get_decoder()
    if body is model:
        raise ValueError("found no base model, whose last hidden state the head reads")
    hidden = random_rows(output.in_features).to(model.device)
    products = random_rows(output.out_features).to(model.device)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.full((1, len(SIZES)), int(padding == 0), dtype=torch.long, device=model.device)
    inputs: list[Tensor] = []  # of the head

    def states(*_: Any, **__: Any) -> BodyOutput:
        return BodyOutput([hidden])

    def product(given: Tensor) -> Tensor:
        inputs.append(given)
        return products

    with replacing(decoder, states), replacing(body, states), replacing(output, product):
        logits = model(input_ids=ids, return_dict=True).logits
    if len(inputs) != 1 or inputs[0].shape != hidden.shape:
        raise ValueError("the logits are not one product of the head with the last hidden state")
    if inputs[0].requires_grad or logits.requires_grad:
        raise ValueError("a trained weight beside the head stands between the last hidden state and the logits")
    if logits.dim() == 2:  # a classifier has those of the last token alone
        products, logits = products[:, -1:], logits[None]
    before, after = fit_scale_and_softcap(hidden, inputs[0]), fit_scale_and_softcap(products, logits)
    if not before or before[1]:
        raise ValueError("the head reads something else than the last hidden state, scaled")
    if not after:
        raise ValueError("the logits are something else than the head's products, scaled and soft-capped")
    if output.bias is not None and before[0] != 1:
        raise ValueError("the last hidden state is scaled, and the head has a bias")
    return before[0] * after[0], after[1]


def random_rows(width: int) -> Tensor:
    """``[1, len(SIZES), width]`` fp32. The numbers are exact in bf16 and fp16, because some models cast to these."""
    generator = torch.Generator().manual_seed(0)
    shape = len(SIZES), width
    sixteenths = torch.randint(8, 16, shape, generator=generator, dtype=torch.float32, device="cpu")
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
    sizes = torch.tensor(SIZES, dtype=torch.float32, device="cpu")
    return (signs * sixteenths / 16 * sizes[:, None])[None]


@contextlib.contextmanager
def replacing(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of ``module`` inside the block."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class BodyOutput(tuple[Tensor, ...]):
    """The output of a model's body: hidden states by index or name, and None for every other name."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def fit_scale_and_softcap(x: Tensor, y: Tensor) -> tuple[float, float | None] | None:
    """The scale and soft-cap that turn ``x`` into ``y``, both of rows by :data:`SIZES`; None where none do."""
    if x.shape != y.shape:
        return None
    x, y = x[0].double(), y[0].double()
    scale, cap = with_few_digits((y[0] / x[0]).median().item()), None
    expected = scale * x
    if not torch.allclose(y, expected, rtol=TOLERANCE, atol=0):
        cap = with_few_digits(y.abs().max().item())
        expected = cap * torch.tanh(expected / cap)
    return (scale, cap) if torch.allclose(y, expected, rtol=TOLERANCE, atol=0) else None


def with_few_digits(value: float) -> float:
    """The number of at most six digits that fp32 has rounded to ``value``; ``value`` itself where there is none."""
    rounded = float(f"{value:.6g}")
    return rounded if math.isclose(rounded, value, rel_tol=1e-7) else value
