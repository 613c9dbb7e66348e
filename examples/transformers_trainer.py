"""``pair_loss`` in Transformers' ``Trainer``: DPO's loss on chosen and rejected answers, without logits in memory.

    python examples/transformers_trainer.py

Dimensions: P pairs, S = 2P sequences (chosen, rejected, chosen, …), L their padded length, N answer tokens.
"""

import copy
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from irlfast.ops import lm_head, log_ratio, pair_loss


class PairTrainer(Trainer):
    """Trains ``model`` to prefer the chosen answers. The reference is the model as it was at the start."""

    def __init__(self, model, *args, beta: float = 0.1, **options):
        super().__init__(model, *args, **options)
        self.reference, self.beta = copy.deepcopy(model).requires_grad_(False), beta

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            hidden, arguments = scored(self.reference.to(model.device), inputs)
            ref_logps = log_ratio(hidden, **arguments).token_logps
        hidden, arguments = scored(model, inputs)
        result = pair_loss(hidden, **arguments, ref_logps=ref_logps, beta=self.beta)
        return (result.loss, {"log_ratio": result.log_ratio}) if return_outputs else result.loss


def scored(model, inputs):
    """Hidden states [S * L, H], and what the operations take with them."""
    hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    answers = {name: inputs[name] for name in ("targets", "cu_seqlens", "rows")}
    return hidden.flatten(0, 1), lm_head(model)._asdict() | answers


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
    }


def train(folder: str, steps: int = 20) -> Trainer:
    """A tiny model learns to prefer the answer that repeats the prompt's first token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    tokens = torch.randint(2, 64, (64, 5)).tolist()  # 1 ends an answer
    rows = [{"prompt": row[:3], "chosen": [row[0], 1], "rejected": [row[3], row[4], 1]} for row in tokens]
    options = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = PairTrainer(model, options, data_collator=collate, train_dataset=rows)
    trainer.train()
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(folder)
