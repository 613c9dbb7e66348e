"""Helpers of the tests with vLLM: its interpreter, prompts, tiny models, and a call of the sampler.

IRLFAST_VLLM_PYTHON names the interpreter that has vLLM.
"""

import os
from pathlib import Path

import peft
import pytest
import torch
import transformers

from irlfast.sampling.shards import Drawn, Shard
from irlfast.sampling.vllm_sampler import generate_vllm
from tests.helpers.shards import SETTINGS, claims

VLLM_PYTHON = os.environ.get("IRLFAST_VLLM_PYTHON", "")

# If the named interpreter has no vLLM, the tests fail: skipping them would hide a broken set-up.
needs_vllm = pytest.mark.skipif(
    not VLLM_PYTHON, reason="IRLFAST_VLLM_PYTHON is not set to an interpreter that has vLLM (.ci/run makes one)"
)

VOCABULARY = 101
# Different lengths. The last two prompts share more than a block of the engine's cache (128 tokens on a CPU).
LENGTHS = (1, 2, 3, 5, 9, 17, 33, 64, 150, 151)
PROMPTS = [
    [(7 * i * i + 3 * length // 150 + 11 * (length % 150) + i) % VOCABULARY for i in range(length)]
    for length in LENGTHS
]
PROMPTS[-1][:140] = PROMPTS[-2][:140]


def answers(policy: Path, *shards: Shard, **settings) -> dict[int, list[list[int]]]:
    """The answers to all shards, in the order in which the shards were done."""
    return {number: [each.ids for each in drawn] for number, drawn in drawn_by(policy, *shards, **settings).items()}


def drawn_by(policy: Path, *shards: Shard, **settings) -> dict[int, list[Drawn]]:
    """The answers to all shards with their log-probabilities, in the order in which the shards were done."""
    return dict(generate_vllm(policy, claims(*shards), **SETTINGS | settings))


def tiny(architecture: str, vocabulary: int = VOCABULARY):
    """Return a random model whose two best logits differ by at least 1e-3 on PROMPTS: 300 times fp32's rounding error.

    With the usual initializer_range of 0.02, rounding decides near-ties, and vLLM rounds differently than Transformers.
    From 0.5 on, rounding errors grow to 1e-4 and decide, too.
    """
    config = {"llama": transformers.LlamaConfig, "gpt_neox": transformers.GPTNeoXConfig}[architecture](
        vocab_size=vocabulary,
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
