"""The policy in training is the policy that sampled: its forward pass draws nothing at random and is always the same.

Models train as they sample, in ``eval()``: dropout, LayerDrop and a router's noise are off whatever a family calls
them. What is random or different all the same is found on a batch of the run, and refused.
"""

import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from irlfast.attention import close, hidden_states
from irlfast.files import InputError
from irlfast.pack import Batch


def recompute_layers(model: Any, *, selective: bool) -> None:
    """Keep of a layer its input alone for the backward pass; ``selective``: what its matrix products gave, too.

    Transformers' own ``gradient_checkpointing_enable`` recomputes in ``train()`` alone.

    Raises:
        InputError: the model's layers are not those that Transformers recomputes.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    kept: dict[str, Any] = {}
    if selective:
        kept["context_fn"] = functools.partial(create_selective_checkpoint_contexts, products)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"gradient_checkpointing: {type(model).__name__} has no layers for it; expected false")
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **kept)


def check_steady(model: Any, batch: Batch) -> None:
    """Make sure that ``model`` draws nothing at random, and gives the same hidden states with and without gradients.

    Raises:
        InputError: it does; the module is named.
    """
    before = randomness()
    with torch.no_grad():
        frozen = hidden_states(model, batch)
    with torch.enable_grad():
        trained = hidden_states(model, batch).detach()
    if randomness() != before:
        raise InputError(f"{culprit(model, batch, randomness)} draws random numbers, though the model is in eval()")
    if not close(trained, frozen, frozen.dtype):
        raise InputError(f"{type(model).__name__}: its hidden states with gradients differ from those without")


def randomness() -> tuple[Any, ...]:
    """The states of all generators that a model may draw from."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    torchs = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    return *torchs, random.getstate(), pickle.dumps(np.random.get_state())


def culprit(model: Any, batch: Batch, state: Callable[[], Any]) -> str:
    """The innermost module of ``model`` whose forward pass changes ``state()``, by its name and type."""
    names = {module: name for name, module in model.named_modules()}
    before: dict[torch.nn.Module, Any] = {}
    found: list[torch.nn.Module] = []

    def enter(module: torch.nn.Module, *_: Any) -> None:
        before[module] = state()

    def leave(module: torch.nn.Module, *_: Any) -> None:
        if module in names and not found and state() != before[module]:
            found.append(module)

    with (
        torch.no_grad(),
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave),
    ):
        hidden_states(model, batch)
    return f"{type(model).__name__}: {names[found[0]]} ({type(found[0]).__name__})" if found else type(model).__name__
