"""Facts of each method that the configuration needs, without importing torch.

:data:`irlfast.methods.METHODS` has the functions of the same methods.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodFacts:
    """A method's own defaults, and what it needs and leaves."""

    preset: dict[str, Any] = field(default_factory=dict)  # the method's defaults where they differ from the schema's
    has_stages: bool = True  # False: the method is SFT alone
    learns_reward: bool = False  # the method trains a reward model on the pairs that `reward_data` names
    aligns: bool = False  # the policy answers each prompt n times, and learns from the rewards of its answers
    has_teacher: bool = False  # a second model in training, without a gradient, reads the demonstration in its prompt
    thinks: bool = False  # the policy samples a thought to each prompt, and answers after it
    needs_rejected: bool = False  # the rows must have a chosen and a rejected answer
    triplets: bool = False  # the first policy's answers are learned from, too, and there is no reference
    leaves_policy: bool = True  # False: `final/` is a reward model

    @property
    def learns_pairs(self) -> bool:
        """Whether a stage of the method minimises a loss of pairs of answers (IRFT and its relatives)."""
        return self.has_stages and self.leaves_policy and not (self.aligns or self.has_teacher or self.thinks)


METHOD_FACTS: dict[str, MethodFacts] = {
    "irft": MethodFacts(),
    "spin": MethodFacts(
        preset={"prompts_per_stage": "all", "history": 1, "loss_type": "sigmoid", "reference": "stage"},
    ),
    "t_spin": MethodFacts(preset={"prompts_per_stage": "all", "beta": 1.0}, triplets=True),
    "dpo": MethodFacts(preset={"prompts_per_stage": "all", "stages": 1}, needs_rejected=True),
    "rft": MethodFacts(learns_reward=True, aligns=True),
    "afd": MethodFacts(preset={"reward_loss": "bce"}, learns_reward=True, aligns=True),
    "gad": MethodFacts(
        preset={
            "sft_epochs": 1.0,
            "stages": 1,
            "prompts_per_stage": "all",
            "reward_every": "round",
            "align_rounds": 8,
            "align": "grpo",
            "num_generations": 8,
            "beta": 0.001,
        },
        learns_reward=True,
        aligns=True,
    ),
    "sdft": MethodFacts(
        preset={
            "stages": 1,
            "prompts_per_stage": "all",
            "reference": "initial",
            "sync_ref_model": True,
            "ref_model_mixup_alpha": 0.01,
            "ref_model_sync_steps": 1,
        },
        has_teacher=True,
    ),
    "r_airl": MethodFacts(
        preset={
            "stages": 1,
            "prompts_per_stage": "all",
            "reward_loss": "bce",
            "reward_level": "token",
            "reward_every": "round",
            "align_rounds": 8,
            "align": "ppo",
            "num_generations": 8,
            "reward_credit": "token",
            "gamma": 0.9,
        },
        learns_reward=True,
        aligns=True,
    ),
    "reasoning": MethodFacts(thinks=True),
    "reward": MethodFacts(
        preset={"prompts_per_stage": "all", "stages": 1, "reward_data": "init_demo"},
        learns_reward=True,
        leaves_policy=False,
    ),
    "sft": MethodFacts(preset={"learn_turns": "all", "sft_epochs": 1.0}, has_stages=False),
}

# The keys that only the methods with a fact read.
READ_WITH: dict[str, tuple[str, ...]] = {
    "learns_pairs": (
        *("loss_type", "loss_weights", "nll_weight", "label_smoothing", "discopop_tau", "reward_shift", "renyi_alpha"),
    ),
    "triplets": ("historical_weight",),
    "learns_reward": (
        *("reward_loss", "reward_level", "reward_regularization", "reward_heads", "reward_models", "reward_every"),
        *("reward_frozen_layers", "reward_epochs", "reward_steps", "reward_learning_rate", "reward_optim"),
    ),
    "aligns": (
        *("align", "kl_in", "reward_credit", "gamma", "whiten_rewards", "missing_eos_penalty", "length_penalty"),
        *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"),
    ),
    "has_teacher": (
        *("teacher_prompt_template", "distillation_mode", "distillation_alpha", "distillation_topk"),
        *("distillation_add_tail", "distillation_is_clip", "num_loss_tokens_to_skip"),
    ),
    "thinks": ("thought_reward", "thought_mark", "max_thought_tokens"),
}

# The policies of a run that an implicit reward can name: those before the first stage, by phase.
OWN_POLICIES = ("initial", "sft-nll", "sft")

# The values of `sft_loss_type` that need a teacher, with their own defaults. In psft the teacher is the policy of up to
# 8 steps before, as in its authors' code.
SFT_TEACHERS: dict[str, dict[str, Any]] = {
    "psft": {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 8},
    "asft": {},
}

# The values of `align` for which `kl_in` has no meaning: the loss of apa has a KL of its own, and bon has none.
OWN_KL = ("apa", "bon")
