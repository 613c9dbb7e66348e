"""``pair_loss`` in Transformers' own ``Trainer``: DPO's loss on chosen and rejected answers, without logits in memory.

    python examples/transformers_trainer.py
    torchrun --nproc_per_node 2 examples/transformers_trainer.py

The model that the ``Trainer`` gets returns its loss, so that nothing of the ``Trainer`` is overridden: mixed precision,
gradient accumulation and several processes work as for any model.

Dimensions: P pairs, S = 2P sequences (chosen, rejected, chosen, …), L their padded length, N answer tokens.
"""

import copy
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from irlfast.ops import lm_head, log_ratio, pair_loss


class WithPairLoss(torch.nn.Module):
    """A policy whose forward returns DPO's loss. The reference is the policy as it was at the start."""

    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch

    def __init__(self, policy, beta: float = 0.1):
        super().__init__()
        self.policy, self.reference = policy, copy.deepcopy(policy).requires_grad_(False)
        self.beta = beta

    def forward(self, input_ids, attention_mask, rows, targets, cu_seqlens, labels=None, num_items_in_batch=None):
        answers = {"rows": rows, "targets": targets, "cu_seqlens": cu_seqlens}
        with torch.no_grad():
            reference = log_ratio(**states_and_head(self.reference.eval(), input_ids, attention_mask), **answers)
        states = states_and_head(self.policy, input_ids, attention_mask)
        result = pair_loss(**states, **answers, ref_logps=reference.token_logps, beta=self.beta)
        loss = result.loss
        if num_items_in_batch is not None:  # the mean over the pairs of all processes and accumulated batches
            loss = loss * (len(input_ids) / 2 / num_items_in_batch)
        return {"loss": loss, "log_ratio": result.log_ratio}


def states_and_head(model, input_ids, attention_mask) -> dict:
    """Hidden states [S * L, H], and the weight, bias, scale and soft-cap of the LM head."""
    hidden = model.model(input_ids, attention_mask=attention_mask).last_hidden_state
    return {"hidden": hidden.flatten(0, 1)} | lm_head(model)._asdict()


def collate(examples: list[dict]) -> dict:
    """Rows of token ids ``prompt``, ``chosen`` and ``rejected`` as one batch."""
    texts = [(row["prompt"], row[name]) for row in examples for name in ("chosen", "rejected")]
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    lengths = torch.tensor([0] + [len(answer) for _, answer in texts])
    return {
        "input_ids": torch.tensor([(prompt + answer + [0] * width)[:width] for prompt, answer in texts]),
        "attention_mask": torch.tensor([[i < len(p) + len(a) for i in range(width)] for p, a in texts]),
        "rows": torch.tensor([i * width + len(p) - 1 + k for i, (p, a) in enumerate(texts) for k in range(len(a))]),
        "targets": torch.tensor([token for _, answer in texts for token in answer]),
        "cu_seqlens": lengths.cumsum(0).int(),
        "labels": torch.ones(len(examples), dtype=torch.long),  # the Trainer counts these: one per pair
    }


def train(folder: str, **options) -> Trainer:
    """A tiny model learns to prefer the answer that repeats the prompt's first token."""
    torch.manual_seed(0)
    policy = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    tokens = torch.randint(2, 64, (64, 5)).tolist()  # 1 ends an answer
    rows = [{"prompt": row[:3], "chosen": [row[0], 1], "rejected": [row[3], row[4], 1]} for row in tokens]
    usual = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "save_strategy": "no",  # policy.save_pretrained saves the policy
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    trainer = Trainer(
        WithPairLoss(policy), TrainingArguments(folder, **usual | options), data_collator=collate, train_dataset=rows
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(folder)
