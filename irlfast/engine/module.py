"""The policy as DeepSpeed sees it: one module from a packed batch to its loss, never through the LM head's logits."""

import contextlib

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from irlfast.data.packing import Batch
from irlfast.losses.inputs import Loss, Metrics, Normalisers
from irlfast.models.forward import body_output
from irlfast.models.moe import balancing_loss
from irlfast.models.prepare import PreparedModel

FEW = 1024  # elements: fewer are not worth a copy


class Policy(torch.nn.Module):
    """A language or reward model with a loss on its hidden states: one module, so that ZeRO-3 gathers its head too."""

    def __init__(
        self, prepared: PreparedModel, loss: Loss, offload: bool = False, router_aux_loss_coef: float = 0.0
    ) -> None:
        super().__init__()
        self.prepared = prepared
        self.model = prepared.model
        self.loss = loss
        self.offload = offload
        self.router_aux_loss_coef = router_aux_loss_coef

    def forward(self, batch: Batch, normalisers: Normalisers) -> tuple[Tensor, Metrics]:
        balanced = {"output_router_logits": True} if self.router_aux_loss_coef else {}
        with offloaded(self.model) if self.offload else contextlib.nullcontext():
            output = body_output(self.model, batch, **balanced)
        hidden = output.last_hidden_state.flatten(0, 1)
        loss, metrics = self.loss(hidden, self.prepared.head(), batch, normalisers)
        if not balanced:
            return loss, metrics
        auxiliary = balancing_loss(self.model, output.router_logits, batch) * metrics["count"]
        weighted = self.router_aux_loss_coef * auxiliary
        metrics |= {"aux_loss": auxiliary.detach(), "loss": metrics["loss"] + weighted.detach()}
        return loss + weighted / normalisers.pairs, metrics


def offloaded(model: torch.nn.Module) -> saved_tensors_hooks:
    """Within it, what operations keep for the backward pass goes to host memory, and comes back when it is asked for.

    The model's own weights stay. Copies run on the GPU's stream from and to pinned memory, so that nothing waits.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def out(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.numel() < FEW or tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def back(kept: tuple[torch.device, Tensor]) -> Tensor:
        return kept[1].to(kept[0], non_blocking=True)

    return saved_tensors_hooks(out, back)
