"""The policy in training is the policy that sampled: its forward pass draws nothing at random and is always the same.

Models train as they sample, in ``eval()``: dropout, LayerDrop and a router's noise are off whatever a family calls
them. What is random all the same, or different, is found on a batch of the run and refused.
"""

import functools
import pickle
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from irlfast.common.files import InputError
from irlfast.data.packing import Batch
from irlfast.models.attention import close, hidden_states


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
    """Make sure that ``model`` gives the same hidden states twice, with gradients and without.

    Raises:
        InputError: it does not; the innermost module that differs is named.
    """
    before = randomness()
    frozen, trained = (hidden_with(model, batch, gradients) for gradients in (False, True))
    drew = randomness() != before and not torch.equal(frozen, trained)  # smaller noise than rounding counts, too
    if not drew and close(trained, frozen, frozen.dtype):
        return
    first, second = (outputs_with(model, batch, gradients) for gradients in (False, True))
    differing = [x for x in first if x not in second or not torch.equal(first[x], second[x])] or [type(model).__name__]
    what = "draws random numbers in eval()" if drew else "gives another result with gradients than without"
    raise InputError(f"{type(model).__name__}: its module {differing[0]} {what}; expected the same result every time")


def randomness() -> tuple[Any, ...]:
    """The states of all generators that a model may draw from."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    torchs = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    return *torchs, random.getstate(), pickle.dumps(np.random.get_state())


def hidden_with(model: Any, batch: Batch, gradients: bool) -> Tensor:
    with torch.set_grad_enabled(gradients):
        return hidden_states(model, batch).detach()


def outputs_with(model: Any, batch: Batch, gradients: bool) -> dict[str, Tensor]:
    """Norms of what every module returned, by its name and type, inner modules first."""
    names = {module: f"{name} ({type(module).__name__})" for name, module in model.named_modules()}
    found: dict[str, list[Tensor]] = {}

    def leave(module: torch.nn.Module, _: Any, output: Any) -> None:
        if module in names:
            tensors = (each for each in tree_leaves(output) if isinstance(each, Tensor))
            found.setdefault(names[module], []).extend(each.detach().double().norm() for each in tensors)

    with torch.nn.modules.module.register_module_forward_hook(leave):
        hidden_with(model, batch, gradients)
    return {name: torch.stack(norms) for name, norms in found.items() if norms}
