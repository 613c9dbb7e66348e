"""The module that DeepSpeed trains: from a packed batch to its loss, without the logits of the LM head."""

import contextlib

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from irlfast.data.packing import Batch
from irlfast.engine.teacher import TeacherModel, teach
from irlfast.losses.inputs import Loss, Metrics, Normalisers
from irlfast.models.forward import body_output
from irlfast.models.moe import balancing_loss
from irlfast.models.prepare import PreparedModel

MIN_OFFLOADED = 1024  # elements: a smaller tensor is not worth a copy


class Policy(torch.nn.Module):
    """A language or reward model with a loss on its hidden states: one module, so that ZeRO-3 gathers its head too."""

    def __init__(
        self,
        prepared: PreparedModel,
        loss: Loss,
        offload: bool = False,
        router_aux_loss_coef: float = 0.0,
        teacher: TeacherModel | None = None,
    ) -> None:
        super().__init__()
        self.prepared = prepared
        self.model = prepared.model
        self.loss = loss
        self.offload = offload
        self.router_aux_loss_coef = router_aux_loss_coef
        self.teacher = teacher  # in a tuple, so that it is no part of this module, and DeepSpeed leaves it alone

    def forward(self, batch: Batch, normalisers: Normalisers) -> tuple[Tensor, Metrics]:
        """Return the batch's part of the step's loss, and metrics summed over its prompt groups."""
        taught = {"teacher": teach(self.teacher, batch)} if self.teacher else {}
        balanced = {"output_router_logits": True} if self.router_aux_loss_coef else {}
        with offloaded(self.model) if self.offload else contextlib.nullcontext():
            output = body_output(self.model, batch, **balanced)
        hidden = output.last_hidden_state.flatten(0, 1)
        loss, metrics = self.loss(hidden, self.prepared.head(), batch, normalisers, **taught)
        if not balanced:
            return loss, metrics
        auxiliary = balancing_loss(self.model, output.router_logits, batch) * metrics["count"]
        weighted = self.router_aux_loss_coef * auxiliary
        metrics |= {"aux_loss": auxiliary.detach(), "loss": metrics["loss"] + weighted.detach()}
        return loss + weighted / normalisers.pairs, metrics


def offloaded(model: torch.nn.Module) -> saved_tensors_hooks:
    """Within the context, keep activations for the backward pass in host memory, and copy them back when it needs them.

    The model's weights stay on the GPU. Copies use pinned memory and the GPU's own stream, so nothing waits.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.numel() < MIN_OFFLOADED or tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = kept
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(to_host, from_host)
