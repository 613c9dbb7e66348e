"""Helpers of the tests of sampling by vLLM: prompts, tiny models, and a call of the sampler."""

from pathlib import Path

import peft
import torch
import transformers

from irlfast.sampling.vllm_sampler import Shard, generate_vllm

SETTINGS = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_new_tokens": 24,
    "ends": [2],
    "dtype": "float32",
    "max_model_len": 256,
}

VOCABULARY = 101
# Different lengths. The last two prompts share more than a block of the engine's cache (128 tokens on a CPU).
LENGTHS = (1, 2, 3, 5, 9, 17, 33, 64, 150, 151)
PROMPTS = [
    [(7 * i * i + 3 * length // 150 + 11 * (length % 150) + i) % VOCABULARY for i in range(length)]
    for length in LENGTHS
]
PROMPTS[-1][:140] = PROMPTS[-2][:140]


def answers(policy: Path, *shards: Shard, python: str | None = None, **settings) -> dict[int, list[list[int]]]:
    return dict(generate_vllm(policy, shards, python=python, **SETTINGS | settings))


def tiny(architecture: str):
    """Return a random model whose two best logits differ by at least 1e-3 on PROMPTS: 300 times fp32's rounding error.

    With the usual initializer_range of 0.02, rounding decides near-ties, and vLLM rounds differently than Transformers.
    From 0.5 on, rounding errors grow to 1e-4 and decide, too.
    """
    config = {"llama": transformers.LlamaConfig, "gpt_neox": transformers.GPTNeoXConfig}[architecture](
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def perturbed_lora(model, rank: int):
    """Return the model with an adapter that changes its answers."""
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted
