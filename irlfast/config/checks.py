"""Checks of several keys together, and of files that keys name. Nothing heavy is imported."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from irlfast.common.addresses import check_address, warn_of_open_key
from irlfast.common.files import InputError, find_path, is_glob, is_local
from irlfast.common.ranks import world_size
from irlfast.common.secrets import redacted
from irlfast.config.deepspeed import merged_settings, zero_stage
from irlfast.config.methods import METHOD_FACTS, READ_WITH, SFT_TEACHERS
from irlfast.config.reward_checks import check_added_rewards, check_alignment, check_features, check_reward
from irlfast.config.sampling_checks import check_async_sampling, check_split_sampling, check_vllm_server
from irlfast.config.types import DATASETS, is_set, listed, shown

IN_PLACE_OF = {"inner_epochs": "inner_steps", "sft_epochs": "sft_steps", "reward_epochs": "reward_steps"}
# A list has one value per stage.
PER_STAGE = ("learning_rate", "beta", "renyi_alpha", "temperature", "inner_epochs", "inner_steps")
LOSS_OPTIONS = {  # the values of loss_type that use each of these keys
    "label_smoothing": ("cdpo", "robust", "exo_pair"),
    "discopop_tau": ("discopop",),
    "reward_shift": ("bco_pair", "space", "kto_pair"),
    "renyi_alpha": ("iris",),
}
# The largest numbers of keys; other keys take any up to LARGEST. A seed is multiplied by 10^8 for the seeds of samples.
STEPS, EPOCHS, LARGEST = 10**7, 10**4, 10**9
LARGEST_OF = {
    "seed": 2**31 - 1,
    "stages": 10**4,
    "align_rounds": 10**4,
    **dict.fromkeys(("sft_steps", "sft_nll_steps", "inner_steps", "reward_steps"), STEPS),
    **dict.fromkeys(("sft_epochs", "inner_epochs", "reward_epochs"), EPOCHS),
}
# Texts of these keys are in the model's files and in its training data.
LEARNED = (
    *("chat_template", "chat_template_kwargs", "prompt_template", "system_prompt"),
    *("teacher_prompt_template", "thought_mark"),
)
HOSTS = {"WANDB_BASE_URL": "wandb", "MLFLOW_TRACKING_URI": "mlflow"}  # variables that name a tracker's server
# The values of loss_type that take each reward alone, so that rewards need the zero that a reference gives them.
EACH_REWARD_ALONE = ("nca_pair", "bco_pair", "space", "iris", "kto_pair", "apo_zero", "apo_down", "sppo_hard")


def check(config: Any) -> None:
    """Run every check.

    Raises:
        InputError: a check fails; the message names the keys.
    """
    check_values(config)
    check_model(config)
    check_reward(config)
    check_added_rewards(config)
    check_alignment(config)
    check_features(config)
    check_phases(config)
    check_pair_loss(config)
    check_triplets(config)
    check_history(config)
    check_lengths(config)
    check_teacher(config)
    check_engine(config)
    check_split_sampling(config)
    check_offloading(config)
    check_4bit(config)
    check_tracking(config)
    check_vllm_server(config)
    check_async_sampling(config)
    check_data(config)


def check_values(config: Any) -> None:
    """Check that no number is too large for its use, and that every text can be written to a file."""
    for name in type(config).__pydantic_fields__:
        for value in listed(getattr(config, name)):
            largest = LARGEST_OF.get(name, LARGEST)
            if isinstance(value, int | float) and abs(value) > largest:
                raise InputError(f"{name}: found {shown(value)}, expected a size of at most {largest:,}")
            if name in LEARNED and redacted(value) != value:
                raise InputError(
                    f"{name}: found a secret in a text that the model learns and its files keep; expected it without"
                )
            if isinstance(value, str) and not is_text(value):
                raise InputError(
                    f"{name}: found {shown(value)}, expected a text of characters that UTF-8 has, without NUL"
                )


def is_text(value: str) -> bool:
    """Return whether a text can be written to a file, and be the name of one."""
    return "\0" not in value and value == value.encode(errors="replace").decode()


def check_model(config: Any) -> None:
    if (config.model_name_or_path is None) == (config.config_name is None):
        raise InputError("model_name_or_path and config_name: expected exactly one of them")
    if config.config_name and not (config.train_tokenizer or config.tokenizer_name_or_path):
        raise InputError(
            "config_name: a new model needs a tokenizer; expected tokenizer_name_or_path or train_tokenizer"
        )
    if config.train_tokenizer and not config.config_name:
        raise InputError("train_tokenizer: a given model has a tokenizer of its own; expected config_name, a new model")
    for name in ("config_name", "model_name_or_path", "reward_backbone"):
        check_path(name, getattr(config, name))


def check_data(config: Any) -> None:
    if not config.dataset_name:
        raise InputError("dataset_name: found nothing, expected a file of demonstrations or a hub dataset")
    for name in DATASETS:
        check_datasets(name, getattr(config, name))
    if config.prompt_dataset_name and not config.facts.aligns:
        methods = ", ".join(name for name, facts in METHOD_FACTS.items() if facts.aligns)
        raise InputError(
            f"prompt_dataset_name: found {config.prompt_dataset_name!r} with method {config.method}, which needs a "
            f"demonstration for every prompt; expected one of the methods {methods}"
        )
    if config.dataset_test_split == config.dataset_train_split and not config.eval_dataset_name:
        raise InputError(
            f"dataset_test_split: found {config.dataset_test_split!r}, which the run learns from; expected another"
        )


def check_lengths(config: Any) -> None:
    if config.max_prompt_length >= config.max_length:
        raise InputError(
            f"max_prompt_length: found {config.max_prompt_length}, expected less than max_length ({config.max_length})"
        )
    if config.prompt_template.count("{}") != 1:
        raise InputError("prompt_template: expected '{}' exactly once, where the prompt goes")


def check_phases(config: Any) -> None:
    """Check that each phase has steps to train, and values for each stage."""
    for first, second in IN_PLACE_OF.items():
        if getattr(config, first) is not None and getattr(config, second) is not None:
            raise InputError(f"{first} and {second}: expected at most one of them")
    for name in PER_STAGE:
        value = getattr(config, name)
        if isinstance(value, list) and len(value) != config.stages:
            raise InputError(f"{name}: found {len(value)} values, expected one or one per stage ({config.stages})")
    if config.keep == "best" and not config.eval_every_stage:
        raise InputError(
            "keep: found 'best' with eval_every_stage false, so that most policies have no figure to choose by; "
            "expected keep: last, or eval_every_stage: true"
        )
    check_sft(config)
    if not config.facts.has_stages:
        check_sft_alone(config)


def check_sft(config: Any) -> None:
    """Check that no key of SFT is without an effect."""
    for name in ("sft_loss_type", "sft_nll_steps", "sft_kl_weight"):
        if is_set(config, name) and not (config.sft_epochs or config.sft_steps):
            raise InputError(f"{name}: found {getattr(config, name)} without SFT; expected sft_epochs or sft_steps")
    if is_set(config, "sft_kl_weight") and config.sft_loss_type != "asft":
        raise InputError(
            f"sft_kl_weight: found {config.sft_kl_weight}, which sft_loss_type {config.sft_loss_type} does not use"
        )


def check_sft_alone(config: Any) -> None:
    for name in ("inner_epochs", "inner_steps"):
        if getattr(config, name) is not None:
            raise InputError(f"{name}: method {config.method} takes {name.replace('inner', 'sft')} instead")
    if not (config.sft_epochs or config.sft_steps):
        name = "sft_epochs" if config.sft_steps is None else "sft_steps"
        raise InputError(
            f"{name}: found {getattr(config, name)} with method {config.method}, which would train nothing; "
            "expected more than 0"
        )
    if config.keep == "best" and config.metric_for_best_model == "reward_accuracy" and not config.model_name_or_path:
        raise InputError(
            "metric_for_best_model: found 'reward_accuracy' with SFT of a new model alone, which has no earlier policy "
            "to compare with; expected nll or exact_match"
        )


def check_pair_loss(config: Any) -> None:
    names = listed(config.loss_type)
    if not names:
        raise InputError("loss_type: found an empty list, expected at least one loss")
    if config.loss_weights is not None and len(config.loss_weights) != len(names):
        raise InputError(
            f"loss_weights: found {len(config.loss_weights)} numbers, expected one per loss of loss_type ({len(names)})"
        )
    for key, users in LOSS_OPTIONS.items():
        if is_set(config, key) and not set(users) & set(names):
            raise InputError(f"{key}: found {getattr(config, key)}, which loss_type {', '.join(names)} does not use")
    if "exo_pair" in names and not config.label_smoothing:
        raise InputError("label_smoothing: found 0, expected more than 0 with loss_type exo_pair (its paper has 0.001)")


def check_triplets(config: Any) -> None:
    """Check the keys of a method that learns from the first policy's answers, too, and has no reference."""
    if not config.facts.triplets:
        return
    if config.prompts_per_stage != "all":
        raise InputError(
            f"prompts_per_stage: found {config.prompts_per_stage!r} with method {config.method}, which compares the "
            "answers of all stages to the same prompts; expected all"
        )
    if alone := set(listed(config.loss_type)) & set(EACH_REWARD_ALONE):
        raise InputError(
            f"loss_type: found {', '.join(sorted(alone))} with method {config.method}, which has no reference; "
            "expected a loss of the difference of two rewards, such as sigmoid"
        )
    for name in ("history", "nll_weight", "max_expert_drop"):
        if is_set(config, name):
            raise InputError(
                f"{name}: found {getattr(config, name)} with method {config.method}, which takes no {name}; expected "
                "it left out"
            )


def check_history(config: Any) -> None:
    """Check that the pairs of earlier stages which ``history`` mixes in are of a demonstration and a kept sample."""
    if not config.history:
        return
    if config.facts.needs_rejected:
        raise InputError(f"history: found {config.history} with method {config.method}, which samples none; expected 0")
    if config.facts.learns_reward and config.reward_data in ("preference", "init_sft"):
        raise InputError(
            f"history: found {config.history} with reward_data {config.reward_data}, whose pairs have no "
            "demonstration; expected 0"
        )


def check_teacher(config: Any) -> None:
    """Check the keys of a method, or of a loss of SFT, that has a teacher."""
    in_sft = config.sft_loss_type in SFT_TEACHERS
    if in_sft and config.facts.has_teacher:
        raise InputError(
            f"sft_loss_type: found {config.sft_loss_type!r} with method {config.method}, whose own teacher "
            "sync_ref_model is about; expected nll, dft or iw_sft"
        )
    has_teacher = in_sft or config.facts.has_teacher
    if config.sync_ref_model and not has_teacher:
        raise InputError(f"sync_ref_model: found true with method {config.method}, which has no teacher")
    if has_teacher and zero_stage(config) == 3:
        raise InputError("zero_stage: found 3 with a teacher, which is a whole model in each process; expected 0 to 2")
    if config.facts.has_teacher:
        check_distillation(config)


def check_distillation(config: Any) -> None:
    """Check the keys of a policy that learns from itself with the demonstration in its prompt."""
    if config.distillation_mode == "sampled_token" and config.distillation_alpha != 1:
        raise InputError(
            f"distillation_alpha: found {config.distillation_alpha} with distillation_mode sampled_token, which "
            "estimates the reverse KL alone; expected 1"
        )
    if 0 in listed(config.temperature):
        raise InputError("temperature: found 0, which leaves policy and teacher no distributions; expected more than 0")
    template, places = config.teacher_prompt_template, ("{prompt}", "{privileged_context}")
    try:
        template.format(prompt="", privileged_context="")
        fits = all(place in template for place in places)
    except (KeyError, IndexError, ValueError):
        fits = False
    if not fits:
        raise InputError(
            f"teacher_prompt_template: found {template!r}, expected a text with {' and '.join(places)}, and no other "
            "braces"
        )


def check_engine(config: Any) -> None:
    stage = zero_stage(config)
    if config.dtype == "bfloat16" and stage == 0:
        raise InputError("zero_stage: found 0 with dtype bfloat16, expected 1 to 3 (they keep the fp32 master copy)")
    compiler = os.environ.get("CXX", "g++")
    if config.torch_compile and not shutil.which(compiler):
        raise InputError(f"torch_compile: found no compiler {compiler}, expected one (CXX may name it), or false")
    offload = merged_settings(config)["zero_optimization"].get("offload_optimizer")
    on_disk = isinstance(offload, dict) and offload.get("device") == "nvme"
    if on_disk and (config.save_steps or config.preemption_grace):
        raise InputError(
            f"deepspeed: found offload_optimizer.device nvme in {config.deepspeed}, where no checkpoint has the "
            "optimiser's state; expected cpu, or save_steps: 0 and preemption_grace: 0"
        )


def check_offloading(config: Any) -> None:
    """Check that layers keep activations on the GPU, which can be moved to host memory, and nothing else."""
    if not config.activation_offloading:
        return
    if config.gradient_checkpointing == "selective":
        raise InputError(
            "activation_offloading: found true with gradient_checkpointing 'selective', which keeps its activations on "
            "the GPU; expected gradient_checkpointing true or false"
        )
    if config.torch_compile:
        raise InputError(
            "activation_offloading: found true with torch_compile, whose layers cannot read activations back; "
            "expected one of the two"
        )
    if zero_stage(config) == 3:
        raise InputError(
            "activation_offloading: found true with zero_stage 3, whose gathered weights would be moved, too; "
            "expected zero_stage 0 to 2"
        )


def check_4bit(config: Any) -> None:
    """Check what QLoRA needs."""
    if not config.load_in_4bit:
        return
    if not config.use_peft:
        raise InputError(
            "load_in_4bit: found true without use_peft, but 4-bit weights cannot be trained; expected use_peft: true"
        )
    if zero_stage(config) == 3:
        raise InputError(
            "load_in_4bit: found true with zero_stage 3, which cannot split 4-bit weights; expected 0 to 2"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit: bitsandbytes is not installed; pip install 'bitsandbytes>=0.50'")


def check_tracking(config: Any) -> None:
    """Check the trackers and the hub, and the addresses of their servers."""
    for package in config.report_to:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"report_to: found {package!r}, which is not installed; pip install {package}")
    if config.push_to_hub and not config.hub_model_id:
        raise InputError("push_to_hub: found true without hub_model_id, expected both")
    used = ["HF_ENDPOINT"] if config.push_to_hub else []
    used += [variable for variable, tracker in HOSTS.items() if tracker in config.report_to]
    for variable in used:
        address = os.environ.get(variable)
        if address and (variable != "MLFLOW_TRACKING_URI" or address.startswith("http")):  # it may name a database
            warn_of_open_key(variable, check_address(variable, address))


def remarks(config: Any) -> list[str]:
    """Return what a user may not expect of the keys, though nothing is wrong: a sentence each."""
    unread = unread_keys(config)
    lines = [f"config: {config.method} does not read {', '.join(unread)}"] if unread else []
    batch, processes = config.global_batch_size, world_size()
    if batch < processes:
        lines.append(f"global_batch_size: {batch} in {processes} processes, of which some have nothing to do in a step")
    return lines + bias_of_sampling(config)


def bias_of_sampling(config: Any) -> list[str]:
    """Return a sentence if a policy gradient is of answers that are not drawn from the policy itself."""
    exact = {"temperature": 1, "top_p": 1, "top_k": 0}
    others = [name for name, value in exact.items() if any(each != value for each in listed(getattr(config, name)))]
    loss = f"align {config.align}" if config.facts.aligns else f"method {config.method}"
    if not others or not (config.facts.thinks or (config.facts.aligns and config.align != "bon")):
        return []
    given = ", ".join(f"{name} {getattr(config, name)}" for name in others)
    return [
        f"warning: {given}: answers are not drawn from the policy itself, so that the gradient of {loss} is biased; it "
        f"is not with {', '.join(f'{name} {exact[name]}' for name in others)}"
    ]


def unread_keys(config: Any) -> list[str]:
    """Return the keys that are set, but that the method does not read."""
    unread = [name for fact, names in READ_WITH.items() if not getattr(config.facts, fact) for name in names]
    return [name for name in unread if is_set(config, name)]


def check_path(name: str, value: str | None) -> None:
    """Check that a value which can only be a file exists. A value like ``owner/name`` may be on the hub."""
    if value is None or find_path(value):
        return
    local = name == "config_name" or value.startswith(("/", ".", "~")) or value.count("/") > 1
    if local or Path(value).suffix in (".json", ".jsonl", ".parquet", ".csv"):
        raise InputError(f"{name}: no such file or folder: {value}")


def check_datasets(key: str, value: Any) -> None:
    """Check that files exist, and that all sources have a weight or none has."""
    sources = value if isinstance(value, list) else [value] if value else []
    if len({getattr(source, "weight", None) is None for source in sources}) > 1:
        raise InputError(f"{key}: found sources with a weight and without, expected a weight for each or for none")
    for source in sources:
        name = str(getattr(source, "name", source))
        if not find_path(name) and is_local(name) and not is_glob(name):
            raise InputError(f"{key}: no such file or folder: {name}")
