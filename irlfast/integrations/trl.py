"""TRL's ``DPOTrainer`` with its losses from our operations. Change the import, and nothing else.

from irlfast.integrations.trl import DPOTrainer

Shapes: P pairs, a batch of 2P sequences (chosen, then rejected) of L positions.
"""

import functools
import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast
from unittest import mock

import torch
import trl
from torch import Tensor
from torch.nn.functional import linear, pad
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from irlfast import ops
from irlfast.ops.common.heads import body_of

IN_THREE_PASSES = {"sigmoid": "sigmoid", "hinge": "hinge"}  # TRL's names of losses, and ours
NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
LOGITS_AT_ONCE = 2**24  # numbers of the logits that the statistics for the log hold


class DPOTrainer(trl.DPOTrainer):
    """TRL's trainer, with every option of it.

    Losses of :data:`IN_THREE_PASSES` take three passes over the LM head, in training; entropy, logits and token
    accuracy are then not logged. Evaluation, and what these losses cannot express (other losses, mixtures,
    ``use_weighting``, ``ld_alpha``, ``f_divergence_type``, the auxiliary loss of experts), are TRL's own code on our
    log-probabilities, which logs everything.

    Raises:
        ValueError: TRL refuses an option, or the logits are no product of the LM head (:func:`irlfast.ops.lm_head`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # TRL gives models their head here, before it computes the reference's log-probabilities in advance
        with mock.patch.object(dpo_trainer, "add_fused_lm_head", add_head):
            super().__init__(*args, **kwargs)
        self.in_three_passes = (
            list(self.loss_types) in [[name] for name in IN_THREE_PASSES]
            and self.f_divergence_type == "reverse_kl"
            and self.ld_alpha is None
            and not self.use_weighting
            and not self.aux_loss_enabled
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        if return_outputs or not self.in_three_passes or not model.training:
            return super()._compute_loss(model, inputs, return_outputs)
        keys = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        keys["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        options = {"beta": self.beta, "loss_type": IN_THREE_PASSES[self.loss_types[0]]}
        result = model(**keys, pair_loss=options | {"ref_logps": self.reference(keys, inputs)})
        self.log_pairs(result, inputs)
        return result.loss * self.loss_weights[0]

    @torch.no_grad()
    def reference(self, keys: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """The reference's log-probabilities: per sequence ``[2P]`` where the data has them, else ``[2P, L - 1]``."""
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
            return model(**keys, use_cache=False, fused_lm_head=True).log_probs

    @torch.no_grad()
    def log_pairs(self, result: ops.PairLoss, inputs: dict[str, Tensor]) -> None:
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
            self._metrics["train"][name].append(value)
        tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
        self._total_train_tokens += tokens // self._tp_size
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]


def add_head(model: Any, outputs: tuple[str, ...] = ("log_probs",)) -> None:
    """Give ``model`` a forward that, with ``fused_lm_head=True``, returns what TRL's fused head returns.

    With ``pair_loss=options`` it returns ``ops.pair_loss`` of its hidden states. Both are computed inside the forward,
    where DeepSpeed, FSDP and DDP have gathered the weights of the LM head. ``outputs`` names the fields to compute.
    """
    ops.lm_head(model)  # probe the model before an engine takes its weights
    usual = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        pair_loss: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head and pair_loss is None:
            return usual(*args, **kwargs)
        labels = kwargs.pop("labels")
        body = body_of(self)(*args, **kwargs | {"use_cache": False})
        head = ops.lm_head(self)
        hidden, labels = body.last_hidden_state.to(head.weight.device), labels.to(head.weight.device)
        if pair_loss is not None:
            return pairs_of(hidden, head, labels, **pair_loss)
        aux_loss = aux_loss_of(self, body, **kwargs) if kwargs.get("output_router_logits") else None
        return scores(hidden, head, labels, outputs, aux_loss)

    model.forward = types.MethodType(forward, model)


def pairs_of(hidden: Tensor, head: ops.Head, labels: Tensor, ref_logps: Tensor, **options: Any) -> ops.PairLoss:
    """``ops.pair_loss``, with the chosen answers in the first half; ``ref_logps`` ``[2P]`` or ``[2P, L - 1]``."""
    if ref_logps.dim() == 2:
        virtual = labels.shape[1] - 1 - ref_logps.shape[1]  # tokens that prompt learning puts before the others
        ref_logps = pad(ref_logps, (virtual, 1)).flatten()
    pairs = torch.arange(len(labels), device=labels.device).view(2, -1).T
    flat = ops.flatten_labels(labels, shifted=False)
    return ops.pair_loss(
        hidden.flatten(0, 1),
        **head._asdict(),
        **flat._asdict(),
        pairs=pairs,
        ref_logps=ref_logps.to(labels.device),
        **options,
    )


def scores(
    hidden: Tensor,  # [B, L, H]
    head: ops.Head,
    labels: Tensor,  # [B, L]
    outputs: tuple[str, ...],
    aux_loss: Tensor | None,
) -> FusedCausalLMOutput:
    """Log-probabilities of the labels, and the statistics that ``outputs`` names, ``[B, L - 1]`` each."""
    flat = ops.flatten_labels(labels, shifted=False)
    logps = ops.log_ratio(hidden.flatten(0, 1), **head._asdict(), **flat._asdict()).token_logps
    mask = labels[:, 1:] != -100
    extra = statistics(hidden[:, :-1][mask], head, labels[:, 1:][mask]) if len(outputs) > 1 else {}
    fields = {name: values.new_zeros(mask.shape).masked_scatter(mask, values) for name, values in extra.items()}
    return FusedCausalLMOutput(log_probs=logps.view(labels.shape)[:, :-1], label_mask=mask, aux_loss=aux_loss, **fields)


@torch.no_grad()
def statistics(hidden: Tensor, head: ops.Head, targets: Tensor) -> dict[str, Tensor]:
    """TRL's statistics ``[N]`` of the distributions that hidden states ``[N, H]`` predict, by a pass of their own."""
    rows = max(LOGITS_AT_ONCE // head.weight.shape[0], 1)
    parts = [chunk_statistics(*part, head) for part in zip(hidden.split(rows), targets.split(rows), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def chunk_statistics(hidden: Tensor, targets: Tensor, head: ops.Head) -> dict[str, Tensor]:
    logits = head.logit_scale * linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    if head.logit_softcap is not None:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    logps = logits.log_softmax(-1)
    probabilities = logps.exp()
    return {
        "entropy": -(probabilities * logps).sum(-1),
        "log_sum_sq_probs": probabilities.square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }


def aux_loss_of(model: Any, body: Any, attention_mask: Tensor | None = None, **_: Any) -> Any:
    """The load-balancing loss of the experts (Switch Transformers, arXiv 2101.03961, eq. 4 to 6)."""
    config = model.config.get_text_config()
    return load_balancing_loss_func(body.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
