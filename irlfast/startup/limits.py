"""Checks at the start of errors that would otherwise end a run hours later: too few rows or tokens, no sampler."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.common.messages import explain_errors
from irlfast.config import Config
from irlfast.config.methods import OWN_POLICIES
from irlfast.data.packing import PromptGroup, count_tokens
from irlfast.data.store import Example, Examples
from irlfast.losses.policy import POLICY_LOSSES
from irlfast.methods.stages import stage_examples, stage_name
from irlfast.models.lora import add_lora
from irlfast.sampling.reward_function import load_function
from irlfast.sampling.rewards import check_policy, reward_config
from irlfast.sampling.scoring import MAX_ANSWERS
from irlfast.sampling.vllm_sampler import GET_VLLM, environment
from irlfast.sampling.vllm_servers import check_servers


def check_sizes(config: Config, train: Examples, *others: Examples) -> None:
    """Check that every stage has rows to learn from, and that their prompt groups fit into a batch.

    Raises:
        InputError: one does not; the message names the key, what was found and what was expected.
    """
    facts = config.facts
    rejected = facts.needs_rejected or (facts.learns_reward and config.reward_data == "preference")
    for stage in range(config.stages if facts.has_stages else 0):
        rows = stage_examples(train, config, stage)
        if not rows:
            raise InputError(
                f"stages: found {config.stages} with prompts_per_stage: split, but {len(train)} rows to learn from; "
                "expected at least one row per stage"
            )
        if rejected and not rows.lengths[:, 2].any():
            raise InputError(
                f"{stage_name(stage)}: found no row with a rejected answer to the prompt; expected rows of chosen and "
                "rejected"
            )
        if (facts.aligns or facts.has_teacher) and len(rows) < config.align_rounds:
            raise InputError(
                f"align_rounds: found {config.align_rounds}, but {stage_name(stage)} has {len(rows)} rows; "
                "expected at least one row per round"
            )
    if config.max_tokens_per_batch != "auto":
        different = itertools.chain(*map(different_lengths, (train, *others)))
        longest = max(count_tokens(group) for row in different for group in groups_of(config, row))
        if longest > config.max_tokens_per_batch:
            raise InputError(
                f"max_tokens_per_batch: found {config.max_tokens_per_batch}, but a prompt with its answers can have "
                f"{longest} tokens; expected at least that, or a lower max_length or max_new_tokens"
            )


def different_lengths(examples: Examples) -> Examples:
    """Return one example for each combination of the lengths of its sequences."""
    return examples[np.unique(examples.lengths, axis=0, return_index=True)[1]]


def groups_of(config: Config, row: Example) -> list[PromptGroup]:
    """Return the prompt groups that a row can become, with sampled answers of the greatest length."""
    sampled: Any = range(config.max_new_tokens)
    answers: list[tuple[Sequence[int], ...]] = [(row.answer_ids, sampled)]
    if row.rejected_ids:
        answers.append((row.answer_ids, row.rejected_ids))
    if config.facts.triplets:
        answers.append((row.answer_ids, sampled, sampled))
    if config.facts.thinks:
        whole: Any = range(config.max_thought_tokens + 1 + len(row.answer_ids))
        answers.append((whole,) * config.num_generations)
    if config.facts.aligns:
        n = config.num_generations
        trained = n if POLICY_LOSSES[config.align].loss else 1  # the others are scored, MAX_ANSWERS at a time
        answers.append((sampled,) * max(trained, min(MAX_ANSWERS, n)))
    groups = [PromptGroup(row.prompt_ids, each) for each in answers]
    if config.facts.has_teacher:
        groups.append(PromptGroup(row.prompt_ids, (sampled,), teacher_prompt=range(config.max_length)))
    return groups


def check_rewards(config: Config) -> None:
    """Check that every added reward can be loaded, and that ``reward_combine`` has several heads to combine.

    Raises:
        InputError: one cannot; the message names the reward, or the key.
    """
    heads = config.reward_heads if config.reward_data != "none" else 0
    for name in config.reward_model_name_or_path:
        model_config = reward_config(name, config)
        learned_here = hasattr(model_config, "irlfast_reward")
        if not learned_here and model_config.num_labels != 1:
            raise InputError(f"reward model {name}: found {model_config.num_labels} labels, expected 1")
        heads += model_config.num_labels if learned_here else 1
    for name in {*config.implicit_reward_policy, *config.implicit_reward_reference}.difference(OWN_POLICIES):
        check_policy(name, config)
    heads += len(config.implicit_reward_policy)
    for name in config.reward_function:
        load_function(name, "reward_function")
        heads += 1
    if config.reward_combine != "mean" and heads < 2:
        raise InputError(f"reward_combine: found {config.reward_combine!r}, but one reward of one head")


def check_async_sampling_on_gpus(config: Config, on_gpu: bool) -> None:
    """Check that servers sample beside training, if it is ``on_gpu``.

    Raises:
        InputError: vLLM would have to sample on GPUs that train.
    """
    if config.async_sampling and on_gpu and not config.vllm_server:
        raise InputError(
            "async_sampling: found true on GPUs that train, which have no room for vLLM meanwhile; expected "
            "vllm_server: servers on other GPUs"
        )


def check_vllm(config: Config) -> None:
    """Check that the interpreter that samples has vLLM, and that every process has its GPUs; or check the servers.

    Raises:
        InputError: there is no vLLM; the message says how to get it. Or the servers cannot sample for this run. Or vLLM
            would have to sample on GPUs that train.
    """
    check_async_sampling_on_gpus(config, torch.cuda.is_available())
    if config.vllm_server:
        thought = config.max_thought_tokens + 1 if config.facts.thinks else 0
        if dist.is_main():
            check_servers(config, config.max_prompt_length + thought + config.max_new_tokens)
        return
    interpreter = config.vllm_python or sys.executable
    variables = environment(config.vllm_tensor_parallel_size)
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([interpreter, "-c", program], env=variables, capture_output=True, check=False)
    except OSError as error:
        raise InputError(f"vllm_python {interpreter}: {error.strerror}; expected an interpreter with vLLM") from error
    if done.returncode:
        raise InputError(f"use_vllm: {interpreter} has no vLLM; {GET_VLLM}")


def check_lora(config: Config, model_config: object) -> None:
    """Check that the model has the modules that ``lora_target_modules`` names.

    Raises:
        InputError: it does not, and the message is PEFT's; or the model cannot be built.
    """
    import transformers

    what = f"model {config.config_name or config.model_name_or_path}: cannot be built"
    with explain_errors(what), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    try:
        add_lora(model, config, reward=False)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"lora_target_modules: found {config.lora_target_modules!r}: {error}") from error
