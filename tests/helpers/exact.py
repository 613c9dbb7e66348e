"""An exact test bed (docs/design.md §3): so few tokens that all answers are enumerated and expectations are sums."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from irlfast import ops
from irlfast.data.packing import PromptGroup, pack
from irlfast.engine.module import Policy
from irlfast.engine.teacher import TeacherModel
from irlfast.losses.inputs import Loss, Normalisers, arguments
from irlfast.models.forward import hidden_states
from irlfast.ops import lm_head
from tests.helpers.prepared import prepared

VOCABULARY, LONGEST, END = 4, 3, 0
PROMPTS = [[1, 2], [3]]
WORDS = range(1, VOCABULARY)
# Every answer that sampling can give: ended by the end token, or cut at LONGEST tokens. Their probabilities sum to 1.
ANSWERS = [
    [*words, last]
    for length in range(LONGEST)
    for words in itertools.product(WORDS, repeat=length)
    for last in (range(VOCABULARY) if length == LONGEST - 1 else [END])
]


def model(seed: int) -> GPT2LMHeadModel:
    """A small random policy in fp64, its next-token distributions clearly different from another seed's."""
    torch.manual_seed(seed)
    size = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.4}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=END, eos_token_id=END, **size)
    return GPT2LMHeadModel(config).double().eval()  # GPT-2, as Llama's norms compute in fp32 whatever its dtype


def answer_logps(policy: GPT2LMHeadModel, prompt: list[int]) -> Tensor:
    """log π(answer | prompt) of every answer, ``[len(ANSWERS)]``, differentiable, by the plain oracle."""
    batch = pack([PromptGroup(prompt, (answer,)) for answer in ANSWERS])
    hidden = hidden_states(policy, batch)
    return ops.log_ratio(hidden, **arguments(lm_head(policy), batch), backend="plain").policy_logps


def scored(reference: GPT2LMHeadModel, pairs: Sequence[PromptGroup]) -> list[PromptGroup]:
    """The pairs with the reference's log-probability of every answer token."""
    batch = pack(pairs)
    with torch.no_grad():
        hidden = hidden_states(reference, batch)
        logps = ops.log_ratio(hidden, **arguments(lm_head(reference), batch), backend="plain").token_logps
    each = iter(logps.split([len(answer) for pair in pairs for answer in pair.answers]))
    return [pair._replace(ref_logps=tuple(next(each) for _ in pair.answers)) for pair in pairs]


def loss_of(
    policy: GPT2LMHeadModel, loss: Loss, pairs: Sequence[PromptGroup], teacher: TeacherModel | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The trainer's own loss of a batch: what its engine calls."""
    expert_tokens = sum(len(pair.answers[0]) for pair in pairs)
    return Policy(prepared(policy), loss, teacher=teacher)(pack(pairs), Normalisers(len(pairs), expert_tokens))


def flat_gradient(value: Tensor, policy: GPT2LMHeadModel) -> Tensor:
    gradients = torch.autograd.grad(value, list(policy.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def kl(expert: GPT2LMHeadModel, policy: GPT2LMHeadModel) -> float:
    """KL(π_E ‖ π_θ) in nats, the mean over prompts."""
    with torch.no_grad():
        both = [(answer_logps(expert, prompt), answer_logps(policy, prompt)) for prompt in PROMPTS]
    return sum((p.exp() * (p - q)).sum().item() for p, q in both) / len(PROMPTS)
