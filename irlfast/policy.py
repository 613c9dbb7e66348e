"""The policy as DeepSpeed sees it: one module from a packed batch to its loss, never through the LM head's logits."""

from typing import Any

import torch
from torch import Tensor

from irlfast.attention import hidden_states
from irlfast.losses import Figures, Loss, Share
from irlfast.model import head_of
from irlfast.pack import Batch


class Policy(torch.nn.Module):
    """A language or reward model with a loss on its hidden states: one module, so that ZeRO-3 gathers its head too."""

    def __init__(self, model: Any, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch, share: Share) -> tuple[Tensor, Figures]:
        hidden = hidden_states(self.model, batch)
        return self.loss(hidden, head_of(self.model), batch, share)
