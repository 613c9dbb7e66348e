"""Checks of the keys of rewards, and of the policy that is aligned to them."""

from typing import Any

from irlfast.common.files import InputError, find_path
from irlfast.config.methods import OWN_KL
from irlfast.config.types import is_set, listed


def check_reward(config: Any) -> None:
    """Check the keys of the reward model that a run learns."""
    if not config.facts.leaves_policy and config.reward_data == "none":
        raise InputError(f"reward_data: found 'none', expected pairs to learn from for method {config.method}")
    if config.reward_data in ("init_sft", "sft_demo") and not (config.sft_epochs or config.sft_steps):
        raise InputError(f"reward_data: {config.reward_data} needs an SFT policy; expected sft_epochs or sft_steps")
    if config.reward_backbone and not (config.facts.learns_reward and config.reward_data != "none"):
        raise InputError(
            f"reward_backbone: found {config.reward_backbone!r}, but the run learns no reward; expected method rft, "
            "afd, gad or reward, with pairs to learn from (reward_data)"
        )
    if config.reward_every == "round" and config.reward_data != "policy_demo":
        raise InputError(
            f"reward_every: found 'round' with reward_data {config.reward_data}, which no round changes; expected "
            "reward_data: policy_demo"
        )
    if config.reward_every == "round" and config.history:
        raise InputError(f"history: found {config.history} with reward_every 'round', expected 0")
    of_pairs = config.reward_loss in ("bradley_terry", "gaussian", "linear")
    if of_pairs and config.reward_level == "token":
        raise InputError(
            f"reward_level: found 'token' with reward_loss {config.reward_loss}, which compares whole answers"
        )
    if of_pairs and config.divergence != "airl":
        raise InputError(
            f"divergence: found {config.divergence!r} with reward_loss {config.reward_loss}, which trains no "
            "discriminator; expected airl, or reward_loss bce"
        )


def check_added_rewards(config: Any) -> None:
    """Check the rewards that a run is given, and how they are combined."""
    learned = config.reward_data != "none"
    added = len(config.reward_model_name_or_path) + len(config.implicit_reward_policy) + len(config.reward_function)
    added += bool(config.feature_reward)
    if config.facts.aligns and not learned and not added:
        raise InputError(
            "reward_model_name_or_path, implicit_reward_policy, feature_reward, reward_function: found none, and "
            "reward_data: none; expected a reward"
        )
    for name in config.reward_model_name_or_path:
        if "," in name and not find_path(name):  # a folder may have a comma in its name
            policy, reference = name.split(",", 1)
            raise InputError(
                f"reward_model_name_or_path: found {name!r}, expected one model; for an implicit reward, "
                f"implicit_reward_policy: {policy} and implicit_reward_reference: {reference}"
            )
    policies, references = config.implicit_reward_policy, config.implicit_reward_reference
    if references and len(references) != len(policies):
        raise InputError(
            f"implicit_reward_reference: found {len(references)}, expected none or one per implicit_reward_policy "
            f"({len(policies)})"
        )
    for name in {*policies, *references}:
        steps = {"sft": config.sft_epochs or config.sft_steps, "sft-nll": config.sft_nll_steps}
        if name in steps and not steps[name]:
            raise InputError(
                f"implicit_reward_policy, implicit_reward_reference: found {name!r}, a policy of the run itself, "
                f"without {'sft_steps' if name == 'sft' else 'sft_nll_steps'}; expected both"
            )
    for key in ("reward_function", "scorer"):
        for name in getattr(config, key):
            check_function(key, name)
    if config.reward_weights and len(config.reward_weights) != learned + added:
        raise InputError(
            f"reward_weights: found {len(config.reward_weights)}, expected {learned + added}, one per reward"
        )
    if config.reward_combine != "mean" and config.reward_heads * config.reward_models < 2 and not added:
        raise InputError(
            f"reward_combine: found {config.reward_combine!r} with one head, expected reward_heads or reward_models of "
            "2 or more"
        )
    if config.reward_models > 1 and not config.facts.leaves_policy:
        raise InputError(
            f"reward_models: found {config.reward_models} with method {config.method}, which leaves one model; "
            "expected 1, and a run per model"
        )


def check_function(key: str, name: str) -> None:
    place, _, function = name.rpartition(":")
    is_file = place.endswith(".py")
    if not function.isidentifier() or not (is_file or all(part.isidentifier() for part in place.split("."))):
        raise InputError(f"{key}: found {name!r}, expected package.module:function or file.py:function")
    if is_file and not find_path(place):
        raise InputError(f"{key}: no such file or folder: {place}")


def check_alignment(config: Any) -> None:
    """Check how the policy is aligned to the rewards."""
    if (config.facts.aligns or config.facts.thinks) and 0 in listed(config.temperature):
        raise InputError(
            f"temperature: found 0 with num_generations {config.num_generations}, whose answers would all be the same; "
            "expected more than 0"
        )
    if config.reward_credit == "token" and config.align in OWN_KL:
        raise InputError(
            f"reward_credit: found 'token' with align {config.align}, which weighs whole answers; expected align "
            "rloo or ppo"
        )
    if config.reward_credit == "token" and config.reward_combine != "mean":
        raise InputError(
            f"reward_credit: found 'token' with reward_combine {config.reward_combine!r}, which is of whole "
            "answers; expected reward_combine: mean"
        )
    if config.gamma != 1 and config.reward_credit == "sequence":
        raise InputError(
            f"gamma: found {config.gamma} with reward_credit 'sequence', expected 1 or reward_credit: token"
        )
    if config.kl_in != "loss" and config.align in OWN_KL:
        raise InputError(
            f"kl_in: found {config.kl_in!r} with align {config.align}; expected it left out: the loss of apa has a KL "
            "of its own, and SFT on the best of n has none"
        )
    check_importance_sampling(config)
    if config.kl_in == "reward" and config.reference == "stage" and config.align_rounds == 1:
        raise InputError(
            "kl_in: found 'reward' with reference 'stage' and align_rounds 1, where the policy that samples is the "
            "reference and its KL is 0; expected kl_in: loss, more rounds, reference: initial, or kl_in: none"
        )


def check_importance_sampling(config: Any) -> None:
    """Check that there is a policy gradient to weight, and that keys of weights have some."""
    if config.vllm_importance_sampling_correction and config.align in OWN_KL:
        raise InputError(
            f"vllm_importance_sampling_correction: found true with align {config.align}, which is no policy gradient; "
            "expected align rloo, ppo or grpo"
        )
    for name in ("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"):
        if is_set(config, name) and not config.vllm_importance_sampling_correction:
            raise InputError(
                f"{name}: found {getattr(config, name)!r} without weights, expected "
                "vllm_importance_sampling_correction: true"
            )


def check_features(config: Any) -> None:
    """Check what the reward of features needs: a demonstration per prompt, and the baseline that it is made for."""
    if not config.feature_reward:
        return
    if config.align not in ("rloo", "ppo") or config.num_generations < 3 or config.reward_credit == "token":
        raise InputError(
            f"feature_reward: found align {config.align}, num_generations {config.num_generations} and reward_credit "
            f"{config.reward_credit}, expected rloo or ppo, 3 or more, and sequence: the price of similar answers is "
            "set for the leave-one-out baseline of whole answers"
        )
    if config.prompt_dataset_name:
        raise InputError(
            f"feature_reward: found prompts without answers ({config.prompt_dataset_name}), expected a demonstration "
            "of each prompt, whose features an answer can match"
        )
