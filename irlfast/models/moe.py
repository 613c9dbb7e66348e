"""The load-balancing loss of a mixture of experts (Switch Transformers, arXiv 2101.03961), as TRL adds it."""

import math
from typing import Any

import torch
from torch import Tensor

from irlfast.common.files import InputError
from irlfast.data.packing import PAD, Batch, PromptGroup, pack
from irlfast.models.checks import SEPARATE
from irlfast.models.forward import body_output


def balancing_loss(model: Any, router_logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Return Transformers' load-balancing loss of a packed batch's tokens, without its padding.

    A prompt that answers share counts once.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits: Any = tuple(each.flatten(0, -2) for each in router_logits)
    experts_per_token = model.config.get_text_config().num_experts_per_tok
    loss = load_balancing_loss_func(logits, logits[0].shape[-1], experts_per_token, batch.group != PAD)
    assert isinstance(loss, Tensor)
    return loss


@torch.no_grad()
def check_router(model: Any, coefficient: float) -> None:
    """Check that :func:`balancing_loss` is the auxiliary loss that ``model`` itself returns.

    Raises:
        InputError: the model has no router, or returns another loss.
    """
    name = type(model).__name__
    batch = pack([PromptGroup([0, 1, 2], ([3, 4, 5],))], SEPARATE).to(model.device)
    router_logits = getattr(body_output(model, batch, output_router_logits=True), "router_logits", None)
    if not router_logits:
        raise InputError(f"router_aux_loss_coef: found {coefficient}, but {name} has no router; expected 0")
    own = model(input_ids=batch.input_ids, output_router_logits=True).aux_loss
    ours = balancing_loss(model, router_logits, batch)
    if own is None or not math.isclose(float(own), float(ours), rel_tol=1e-3):
        raise InputError(f"router_aux_loss_coef: {name} gives {own} as its router's loss, expected {float(ours):.6g}")
