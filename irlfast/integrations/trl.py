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
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import linear, pad
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from irlfast import ops
from irlfast.ops.common.heads import body_of
from irlfast.ops.logits.plain import final_logits

# TRL's losses that pair_loss computes, "sft" beside one of them. The others sort the log-ratios of a batch.
IN_THREE_PASSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
LOGITS_AT_ONCE = 2**24  # numbers of the logits that the statistics for the log hold


class DPOTrainer(trl.DPOTrainer):
    """TRL's trainer, with every option of it.

    In training, losses of :data:`IN_THREE_PASSES` and mixtures of them take three passes over the LM head; entropy,
    logits and token accuracy are then not logged. Evaluation, the other losses and ``use_weighting`` are TRL's own code
    on our log-probabilities, which logs everything.

    Raises:
        ValueError: TRL refuses an option, or the logits are no product of the LM head (:func:`irlfast.ops.lm_head`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # TRL gives models their head here, before it computes the reference's log-probabilities in advance
        with mock.patch.object(dpo_trainer, "add_fused_lm_head", add_head):
            super().__init__(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        options = None if return_outputs or not model.training else self.pair_loss_options()
        if options is None:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.precompute_ref_logps:
            options["ref_logps"] = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            options["ref_logps"] = self.reference_logps(self.ref_model or self.model, inputs)
        if self.ld_alpha is not None:
            options["token_weights"] = self.token_weights(inputs)
        keys = keys_of(inputs) | ({"output_router_logits": True} if self.aux_loss_enabled else {})
        result, aux_loss = model(**keys, pair_loss=options)
        self.log_pairs(result, aux_loss, inputs)
        return result.loss if aux_loss is None else result.loss + self.router_aux_loss_coef * aux_loss

    def pair_loss_options(self) -> dict[str, Any] | None:
        """Options of ``ops.pair_loss`` that say what TRL's configuration says, or None where nothing can."""
        weights = list(zip(self.loss_types, self.loss_weights, strict=True))
        pairs = [(name, weight) for name, weight in weights if name != "sft"]
        names = tuple(name for name, _ in pairs)
        if self.use_weighting or not names or not {*names} <= {*IN_THREE_PASSES}:
            return None
        options: dict[str, Any] = {
            "beta": self.beta,
            "loss_type": names,
            "loss_weights": tuple(weight for _, weight in pairs),
            "nll_weight": sum(weight for name, weight in weights if name == "sft"),
            "f_divergence_type": self.f_divergence_type,
            "f_alpha_divergence_coef": self.f_alpha_divergence_coef,
        }
        if {*names} & {"robust", "exo_pair"}:
            options["label_smoothing"] = self.label_smoothing
        if "discopop" in names:
            options["discopop_tau"] = cast(Any, self.args).discopop_tau
        return options

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The reference's log-probabilities ``[P]`` of chosen and rejected answers, summed as ``ops`` sums."""
        with self.accelerator.autocast():
            logps = self.reference_logps(model, inputs).double()
        return (logps * self.token_weights(inputs)).sum(1).float().chunk(2)

    @torch.no_grad()
    def reference_logps(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The reference's log-probabilities of tokens ``[2P, L - 1]``.

        With LoRA, the reference is the model without its adapter, or with a copy of its first adapter, "ref".
        """
        policy: Any = self.accelerator.unwrap_model(self.model)
        adapter: AbstractContextManager = nullcontext()
        if self.ref_model is None and is_peft_model(policy):
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        checkpointing = cast(Any, self.args.gradient_checkpointing_kwargs)
        with disable_gradient_checkpointing(cast(Any, self.model), checkpointing), adapter:
            logps = model(**keys_of(inputs), fused_lm_head=True).log_probs
        return logps[:, 1 - inputs["input_ids"].shape[1] :]  # without the virtual tokens of prompt learning

    def token_weights(self, inputs: dict[str, Tensor]) -> Tensor:
        """Factors ``[2P, L - 1]`` of tokens: ``ld_alpha`` beyond the length of the shorter answer, else 1."""
        mask = inputs["completion_mask"][:, 1:]
        if self.ld_alpha is None:
            return mask.float()
        shorter = mask.sum(1).view(2, -1).amin(0).repeat(2)
        return torch.where(mask.cumsum(1) <= shorter[:, None], 1.0, self.ld_alpha)

    @torch.no_grad()
    def log_pairs(self, result: ops.PairLoss, aux_loss: Tensor | None, inputs: dict[str, Tensor]) -> None:
        rewards, logps = (self.beta * result.log_ratio).chunk(2), result.policy_logps.chunk(2)
        metrics = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        }
        if aux_loss is not None:
            metrics["aux_loss"] = aux_loss.expand_as(logps[0])
        gathered = self.accelerator.gather(torch.stack(list(metrics.values()), dim=1)).mean(0).tolist()
        for name, value in zip(metrics, gathered, strict=True):
            self._metrics["train"][name].append(value)
        tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
        self._total_train_tokens += tokens // self._tp_size
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]


def keys_of(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the model's forward for a batch, with the labels of the answers."""
    keys = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
    return keys | {"labels": inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)}


def add_head(model: Any, outputs: tuple[str, ...] = ("log_probs",)) -> None:
    """Give ``model`` a forward that, with ``fused_lm_head=True``, returns what TRL's fused head returns.

    With ``pair_loss=options`` it returns ``ops.pair_loss`` and the auxiliary loss. All is computed inside the forward,
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
        aux_loss = aux_loss_of(self, body, **kwargs) if kwargs.get("output_router_logits") else None
        if pair_loss is not None:
            return pairs_of(hidden, head, labels, **pair_loss), aux_loss
        return scores(hidden, head, labels, outputs, aux_loss)

    model.forward = types.MethodType(forward, model)


def pairs_of(hidden: Tensor, head: ops.Head, labels: Tensor, **options: Any) -> ops.PairLoss:
    """``ops.pair_loss``, with the chosen answers in the first half, and what ``options`` have per token as a matrix."""
    for name in ("ref_logps", "token_weights"):
        if name in options and options[name].dim() == 2:  # of the last positions, after the tokens of prompt learning
            virtual = labels.shape[1] - 1 - options[name].shape[1]
            options[name] = pad(options[name].to(labels.device), (virtual, 1)).flatten()
    return ops.pair_loss(
        hidden.flatten(0, 1),
        **head._asdict(),
        **ops.flatten_labels(labels, shifted=False)._asdict(),
        pairs=torch.arange(len(labels), device=labels.device).view(2, -1).T,
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
    products = linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    logits = final_logits(products, head.logit_scale, head.logit_softcap)
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
