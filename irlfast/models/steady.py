"""Deterministic forward passes: the policy in training computes what the policy that sampled computes.

Models train in ``eval()``, as they sample. That turns off dropout, LayerDrop and a router's noise, whatever a family
calls them. Randomness that is left is looked for on a batch of the run, and refused.
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
from irlfast.models.checks import is_close
from irlfast.models.forward import hidden_states


def recompute_layers(model: Any, *, selective: bool) -> None:
    """Recompute every layer in the backward pass from its input; ``selective`` keeps its matrix products, too.

    Transformers' own ``gradient_checkpointing_enable`` recomputes only in ``train()``.

    Raises:
        InputError: the model's layers are not those that Transformers recomputes.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    options: dict[str, Any] = {}
    if selective:
        products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, products)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"gradient_checkpointing: {type(model).__name__} has no layers for it; expected false")
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **options)


def check_steady(model: Any, batch: Batch) -> None:
    """Check that ``model`` gives the same hidden states twice: without gradients and with them.

    Raises:
        InputError: the hidden states differ; the error names the innermost module whose output differs.
    """
    before = random_states()
    frozen, trained = (hidden_with(model, batch, gradients) for gradients in (False, True))
    # Noise may be smaller than rounding. So it counts if a generator has moved and any bit differs.
    drew = random_states() != before and not torch.equal(frozen, trained)
    if not drew and is_close(trained, frozen, frozen.dtype):
        return
    first, second = (output_norms(model, batch, gradients) for gradients in (False, True))
    differing = [x for x in first if x not in second or not torch.equal(first[x], second[x])] or [type(model).__name__]
    what = "draws random numbers in eval()" if drew else "gives another result with gradients than without"
    raise InputError(f"{type(model).__name__}: its module {differing[0]} {what}; expected the same result every time")


def random_states() -> tuple[Any, ...]:
    """Return the states of all random generators that a model may draw from."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    torchs = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    return *torchs, random.getstate(), pickle.dumps(np.random.get_state())


def hidden_with(model: Any, batch: Batch, gradients: bool) -> Tensor:
    with torch.set_grad_enabled(gradients):
        return hidden_states(model, batch).detach()


def output_norms(model: Any, batch: Batch, gradients: bool) -> dict[str, Tensor]:
    """Return the norms of the tensors that each module returns, by the module's name and type, inner modules first."""
    names = {module: f"{name} ({type(module).__name__})" for name, module in model.named_modules()}
    norms: dict[str, list[Tensor]] = {}

    def add_norms(module: torch.nn.Module, _: Any, output: Any) -> None:
        if module in names:
            tensors = (each for each in tree_leaves(output) if isinstance(each, Tensor))
            norms.setdefault(names[module], []).extend(each.detach().double().norm() for each in tensors)

    with torch.nn.modules.module.register_module_forward_hook(add_norms):
        hidden_with(model, batch, gradients)
    return {name: torch.stack(each) for name, each in norms.items() if each}
