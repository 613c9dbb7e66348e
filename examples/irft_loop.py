"""IRFT (arXiv 2405.17888, algorithm 2) as a loop of plain PyTorch: one file, one device, nothing written.

    python examples/irft_loop.py

learns the embedded task on a CPU in a few minutes: SFT, then three stages of IRFT. Tokens are bytes.
Dimensions: S sequences, L their padded length, N answer tokens, H hidden size.
"""

import argparse
import copy
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import irlfast.demo
from irlfast.ops import lm_head, log_ratio, pair_loss

END, PAD = 256, 257  # the tokens behind the 256 bytes
MAX_NEW_TOKENS = 24
Ids = list[int]


class Batch(NamedTuple):
    """Prompts with an answer each, padded on the right, and where the answers' tokens are."""

    input_ids: Tensor  # [S, L]
    mask: Tensor  # [S, L]
    rows: Tensor  # [N] the row of the flattened [S * L] hidden states that predicts each answer token
    targets: Tensor  # [N] the answers' tokens
    cu_seqlens: Tensor  # [S + 1] where each answer begins in targets


def irft(policy, demonstrations, *, stages, batch_size, beta, learning_rate):
    """T stages: the policy answers its prompts, then one epoch of steps prefers the demonstrations to its answers."""
    size = len(demonstrations) // stages
    for stage in range(stages):
        part = demonstrations[stage * size : (stage + 1) * size]
        reference = copy.deepcopy(policy)  # the policy at the start of the stage
        optimizer = torch.optim.RMSprop(policy.parameters(), lr=learning_rate)  # its state starts anew
        synthetic = sample(policy, [prompt for prompt, _ in part])
        both = zip(part, synthetic, strict=True)
        pairs = [(prompt, expert, answer) for (prompt, expert), answer in both if answer != expert]
        random.shuffle(pairs)
        for start in range(0, len(pairs), batch_size):
            loss, margin = irft_step(policy, reference, optimizer, pairs[start : start + batch_size], beta)
        print(f"stage {stage}: {len(pairs)} pairs, loss {loss:.3f}, margin {margin:.3f}", flush=True)


def irft_step(policy, reference, optimizer, pairs, beta):
    """One step on pairs (prompt, expert y, synthetic ỹ): minimise −log σ(u), u = β · (ρ(y) − ρ(ỹ))."""
    batch = pack([(prompt, answer) for prompt, *answers in pairs for answer in answers])
    with torch.no_grad():  # log π_ref of every token
        ref_logps = log_ratio(hidden_states(reference, batch), **arguments(reference, batch)).token_logps
    result = pair_loss(hidden_states(policy, batch), **arguments(policy, batch), ref_logps=ref_logps, beta=beta)
    descend(policy, optimizer, result.loss)
    margins = result.log_ratio[0::2] - result.log_ratio[1::2]
    return result.loss.item(), margins.mean().item()


def sft(policy, demonstrations, *, steps, batch_size, learning_rate):
    """Maximum likelihood of the demonstrations, the warm start."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)
    for _ in range(steps):
        batch = pack(random.sample(demonstrations, batch_size))
        result = log_ratio(hidden_states(policy, batch), **arguments(policy, batch))
        descend(policy, optimizer, -result.policy_logps.sum() / len(batch.targets))


def descend(policy, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def sample(policy, prompts: list[Ids], batch_size=256, greedy=False) -> list[Ids]:
    """An answer to every prompt, with its end token unless ``MAX_NEW_TOKENS`` cut it."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        width = max(map(len, part))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in part])
        draw = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
        ends = {"eos_token_id": END, "pad_token_id": PAD}
        drawn = policy.generate(ids, attention_mask=ids != PAD, max_new_tokens=MAX_NEW_TOKENS, **draw, **ends)
        answers += [[token for token in answer if token != PAD] for answer in drawn[:, width:].tolist()]
    return answers


def pack(examples: list[tuple[Ids, Ids]]) -> Batch:
    """Prompts and answers as one batch. The answer's last token predicts nothing and is left out of the input."""
    read = [prompt + answer[:-1] for prompt, answer in examples]
    width = max(map(len, read))
    rows = [i * width + len(prompt) - 1 + k for i, (prompt, answer) in enumerate(examples) for k in range(len(answer))]
    lengths = torch.tensor([0] + [len(answer) for _, answer in examples])
    return Batch(
        input_ids=torch.tensor([ids + [PAD] * (width - len(ids)) for ids in read]),
        mask=torch.tensor([[k < len(ids) for k in range(width)] for ids in read]),
        rows=torch.tensor(rows),
        targets=torch.tensor([token for _, answer in examples for token in answer]),
        cu_seqlens=lengths.cumsum(0).int(),
    )


def hidden_states(model, batch: Batch) -> Tensor:  # [S * L, H]
    """The last hidden states. The LM head is not run."""
    return model.model(batch.input_ids, attention_mask=batch.mask).last_hidden_state.flatten(0, 1)


def arguments(model, batch: Batch) -> dict:
    answers = {"targets": batch.targets, "cu_seqlens": batch.cu_seqlens, "rows": batch.rows}
    return lm_head(model)._asdict() | answers


def read(name: str) -> list[tuple[Ids, Ids]]:
    """Demonstrations as byte tokens: a prompt ends with a newline, an answer with the end token."""
    path = Path(irlfast.demo.__file__).with_name(name)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [([*row["prompt"].encode(), 10], [*row["completion"].encode(), END]) for row in rows]


def exact_match(policy, demonstrations) -> float:
    answers = sample(policy, [prompt for prompt, _ in demonstrations], greedy=True)
    return sum(a == expert for a, (_, expert) in zip(answers, demonstrations, strict=True)) / len(answers)


def main(sft_steps=400, stages=3, rows=6000, held_out=300):
    torch.manual_seed(0)
    random.seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 6}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=258, tie_word_embeddings=True, initializer_range=0.05, **sizes))
    train, test = read("train.jsonl")[:rows], read("test.jsonl")[:held_out]
    sft(policy, train, steps=sft_steps, batch_size=64, learning_rate=2e-3)
    print(f"exact match after SFT: {exact_match(policy, test):.3f}", flush=True)
    irft(policy, train, stages=stages, batch_size=64, beta=1.0, learning_rate=1e-5)
    print(f"exact match after IRFT: {exact_match(policy, test):.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="IRFT in plain PyTorch on the embedded task.")
    for name, default in (("sft_steps", 400), ("stages", 3), ("rows", 6000), ("held_out", 300)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
