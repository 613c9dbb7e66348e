"""The choice of an attention for a phase, and of the layout of packed batches that goes with it.

On a GPU ``attn_implementation: auto`` chooses between two kinds: flex_attention lets answers share their prompt, and a
faster kernel takes rows of separate sequences. Sharing wins if it saves enough operations on the phase's data.
"""

from collections.abc import Sequence
from typing import Any

import torch

from irlfast.common.messages import log_once
from irlfast.config import Config
from irlfast.data.packing import Layout, PromptGroup, token_counts
from irlfast.models import varlen
from irlfast.models.configs import attention_head_size
from irlfast.models.costs import Costs, operations
from irlfast.models.forward import attention_of, takes_cu_seqlens

MIN_SAVING = 0.05  # share of the operations that makes flex_attention worth more than a faster kernel
FLEX_HEAD_SIZE = 16  # the smallest head that flex_attention's kernel takes
FLEX_VARIANTS = 64  # that torch may compile of flex_attention: for grouped rows, single rows, gradients, each policy
SAMPLE_SIZE = 1000  # prompt groups whose lengths are looked at


def arrange(model: Any, config: Config, costs: Costs, groups: Sequence[PromptGroup], can_share: bool) -> Layout:
    """Set the model's attention for ``groups``, log why, and return how they are packed for it.

    ``can_share``: the model's answers can share a prompt.
    """
    if not can_share and not takes_cu_seqlens(model):
        log_once(f"warning: {type(model).__name__} cannot share a prompt between answers; each gets its own")
    on_cpu = model.device.type == "cpu"
    if config.attn_implementation != "auto":
        shared = can_share and not takes_cu_seqlens(model)
    else:
        saving, lengths = sharing(costs, groups)
        if not on_cpu:
            can_flex = can_share and attention_head_size(model) >= FLEX_HEAD_SIZE
            model.set_attn_implementation(choose(can_flex, saving, unshared_attention(model)))
        shared = can_share and not takes_cu_seqlens(model)
        saves = f"sharing prompts {'saves' if shared else 'would save'} {saving:.0%} of the operations"
        log_once(f"attention: {attention_of(model)}; {saves}: {lengths}")
    flex = attention_of(model) == "flex_attention"
    if flex:
        keep_compiled()
    return Layout(shared, not on_cpu and (flex or takes_cu_seqlens(model)))


def set_uncompiled(model: Any, config: Config) -> None:
    """Replace flex_attention, which an earlier phase chose: the checks of a model would compile it for their batch."""
    if config.attn_implementation == "auto" and attention_of(model) == "flex_attention":
        model.set_attn_implementation("sdpa")


def keep_compiled() -> None:
    """Let torch compile flex_attention anew for every kind of batch of a run.

    torch's own limit is 8 variants. After it, torch runs code that holds the scores of all pairs of tokens in memory.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, FLEX_VARIANTS)


def choose(flex: bool, saving: float, unshared: str | None) -> str:
    """Return the attention to run on a GPU.

    ``flex``: flex_attention can run the model, and sharing prompts saves ``saving`` of the operations.
    ``unshared``: a faster attention for rows of separate sequences, or None.
    """
    if flex and (saving >= MIN_SAVING or not unshared):
        return "flex_attention"
    return unshared or "sdpa"


def unshared_attention(model: Any) -> str | None:
    """Return the attention for rows of separate sequences that can run ``model`` here, or None.

    It is flash-attn if that is installed, else torch's own.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if model.dtype in (torch.bfloat16, torch.float16):
        if is_flash_attn_3_available() and torch.cuda.get_device_capability(model.device)[0] == 9:
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return varlen.NAME if varlen.register(model) else None


def sharing(costs: Costs, groups: Sequence[PromptGroup]) -> tuple[float, str]:
    """Return the share of a step's operations that shared prompts save, and the mean lengths that it follows from."""
    sample = groups[:: -(-len(groups) // SAMPLE_SIZE)]
    together, apart = (operations(costs, token_counts(sample, Layout(shared=shared))) for shared in (True, False))
    answers = [len(answer) for group in sample for answer in group.answers]
    prompt_length = sum(len(group.prompt) for group in sample) / len(sample)
    per_prompt = f"{len(answers) / len(sample):.0f} answer{'s' * (len(answers) > len(sample))}"
    answer_length = sum(answers) / len(answers)
    return (
        1 - together / apart,
        f"on average prompts of {prompt_length:.0f} tokens with {per_prompt} of {answer_length:.0f}",
    )
