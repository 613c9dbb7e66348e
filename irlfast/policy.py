"""The policy as DeepSpeed sees it: one module from a packed batch to its loss, never through the LM head's logits."""

from typing import Any

import torch
from torch import Tensor

from irlfast.attention import hidden_states
from irlfast.losses import Figures, Loss, Share
from irlfast.ops import lm_head
from irlfast.pack import Batch


class Policy(torch.nn.Module):
    """A causal model with a loss on its hidden states. One module, so that ZeRO-3 gathers the LM head's weight too."""

    def __init__(self, model: Any, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch, share: Share) -> tuple[Tensor, Figures]:
        hidden = hidden_states(self.model, batch)
        return self.loss(hidden, lm_head(self.model), batch, share)
