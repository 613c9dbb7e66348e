"""The load-balancing loss of a mixture of experts (Switch Transformers, arXiv 2101.03961), as TRL adds it."""

import math
from typing import Any

import torch
from torch import Tensor

from irlfast.common.files import InputError
from irlfast.data.packing import PAD, Batch, PromptGroup, pack
from irlfast.models.attention import APART, body_output


def balancing_loss(model: Any, router_logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Transformers' own, of the tokens of a packed batch without its padding; a shared prompt counts once."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits: Any = tuple(each.flatten(0, -2) for each in router_logits)
    chosen = model.config.get_text_config().num_experts_per_tok
    loss = load_balancing_loss_func(logits, logits[0].shape[-1], chosen, batch.group != PAD)
    assert isinstance(loss, Tensor)
    return loss


@torch.no_grad()
def check_router(model: Any, coefficient: float) -> None:
    """Make sure that the loss is the one that ``model`` itself gives.

    Raises:
        InputError: the model has no router, or another loss for it.
    """
    name = type(model).__name__
    batch = pack([PromptGroup([0, 1, 2], ([3, 4, 5],))], APART).to(model.device)
    found = getattr(body_output(model, batch, output_router_logits=True), "router_logits", None)
    if not found:
        raise InputError(f"router_aux_loss_coef: found {coefficient}, but {name} has no router; expected 0")
    own = model(input_ids=batch.input_ids, output_router_logits=True).aux_loss
    ours = balancing_loss(model, found, batch)
    if own is None or not math.isclose(float(own), float(ours), rel_tol=1e-3):
        raise InputError(f"router_aux_loss_coef: {name} gives {own} as its router's loss, expected {float(ours):.6g}")
