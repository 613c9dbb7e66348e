"""TRL's ``DPOTrainer`` with its loss from the pair slab. Change the import, and nothing else.

from irlfast.integrations.trl import DPOTrainer
"""

import functools
import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import trl
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from irlfast import ops
from irlfast.ops.common.heads import body_of, unwrapped

SUPPORTED = {
    "f_divergence_type": ("reverse_kl",),
    "ld_alpha": (None,),
    "use_weighting": (False,),
    "label_smoothing": (0.0,),
    "aux_loss_enabled": (False,),
}


class DPOTrainer(trl.DPOTrainer):
    """TRL's trainer for ``loss_type`` ``sigmoid`` or ``hinge``; entropy, logits and token accuracy are not logged.

    Raises:
        ValueError: the fused loss does not support an option of TRL's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.loss_types not in (["sigmoid"], ["hinge"]):
            raise ValueError(f"loss_type: found {self.loss_types}, expected 'sigmoid' or 'hinge'")
        for name, expected in SUPPORTED.items():
            if getattr(self, name) not in expected:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {expected[0]!r}")
        add_pair_loss(unwrapped(self.accelerator.unwrap_model(self.model)))

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        if return_outputs:
            return super()._compute_loss(model, inputs, return_outputs)
        keys = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        keys["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        options = {"beta": self.beta, "loss_type": self.loss_types[0], "ref_logps": self.reference(keys, inputs)}
        result = model(**keys, pair_loss=options)
        self.log_pairs(result, inputs)
        return result.loss * self.loss_weights[0]

    @torch.no_grad()
    def reference(self, keys: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """The reference's log-probabilities: per sequence ``[2P]`` where the data has them, else per token ``[N]``."""
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        model: Any = self.ref_model
        adapter: AbstractContextManager = nullcontext()
        if model is None:  # LoRA: the reference is the model without its adapter, or with its first adapter, "ref"
            model = self.model
            unwrapped = self.accelerator.unwrap_model(model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        policy, checkpointing = cast(Any, self.model), cast(Any, self.args.gradient_checkpointing_kwargs)
        with disable_gradient_checkpointing(policy, checkpointing), adapter:
            logps = model(**keys, use_cache=False, fused_lm_head=True).log_probs
        return logps[keys["labels"][:, 1:] != -100]

    @torch.no_grad()
    def log_pairs(self, result: ops.PairLoss, inputs: dict[str, Tensor]) -> None:
        mode = "train" if cast(Any, self.model).training else "eval"
        rewards, logps = (self.beta * result.log_ratio).chunk(2), result.policy_logps.chunk(2)
        metrics = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        }
        gathered = self.accelerator.gather(torch.stack(list(metrics.values()), dim=1)).mean(0).tolist()
        for name, value in zip(metrics, gathered, strict=True):
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


def add_pair_loss(model: Any) -> None:
    """Give ``model`` a forward that, with ``pair_loss=options``, returns ``ops.pair_loss`` of its hidden states.

    The loss is computed inside the forward, where DeepSpeed, FSDP and DDP have gathered the weights of the LM head.
    ``input_ids`` and ``labels`` hold the chosen sequences, then the rejected ones.
    """
    ops.lm_head(model)  # probe the model before an engine takes its weights
    usual = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, pair_loss: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if pair_loss is None:
            return usual(*args, **kwargs)
        labels = kwargs.pop("labels")
        hidden = body_of(self)(*args, **kwargs, use_cache=False).last_hidden_state
        predicts = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))  # the last position predicts nothing
        head = ops.lm_head(self)
        return ops.pair_loss(
            hidden.flatten(0, 1).to(head.weight.dtype),
            targets=labels[:, 1:][predicts[:, :-1]],
            cu_seqlens=torch.nn.functional.pad(predicts.sum(1).cumsum(0), (1, 0)).int(),
            rows=predicts.flatten().nonzero().flatten(),
            pairs=torch.arange(len(labels), device=labels.device).view(2, -1).T,
            **head._asdict(),
            **pair_loss,
        )

    model.forward = types.MethodType(forward, model)
