"""The configuration: one frozen dataclass, read from flat YAML and the command line, validated before anything heavy.

The description of every key is its ``--help`` line. Pydantic checks types, bounds and names (it names every wrong key
with what it found, reads YAML's ``5e-7`` as the number it is, and DeepSpeed depends on it anyway); argparse reads the
command line and prints the help.
"""

import argparse
import dataclasses
import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from irlfast.config_checks import check
from irlfast.files import InputError
from irlfast.recipes import recipe

PRESETS: dict[str, dict[str, Any]] = {
    "spin": {"prompts_per_stage": "all", "history": 1, "loss_type": "sigmoid", "reference": "stage"},
    "dpo": {"prompts_per_stage": "all", "stages": 1},
    "reward": {"prompts_per_stage": "all", "stages": 1, "reward_data": "init_demo"},
    "afd": {"reward_loss": "bce"},
}
ALIASES = {"bf16": ("dtype", "bfloat16"), "use_vllm": ("sampler", "vllm")}  # TRL's spellings, when true

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


def key(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Config:
    """Every key of a run (flat YAML; TRL's name where TRL has one)."""

    # The run
    method: Literal["irft", "spin", "dpo", "rft", "afd", "reward", "sft"] = key(
        "irft",
        "irft, spin (irft with SPIN's preset), dpo (chosen against rejected); rft, afd (rft with a discriminator): "
        "learn a reward, align to it; reward or sft alone",
    )
    output_dir: str = key("runs/irft", "folder of the run; the same command again resumes there")
    seed: Annotated[int, Field(ge=0)] = key(0, "seed of new weights, shuffling and sampling")

    # The model
    model_name_or_path: str | None = key(None, "the policy to start from: a folder or a hub name")
    model_revision: str = key("main", "its branch, tag or commit on the hub, also of its tokenizer and config")
    config_name: str | None = key(None, "instead of a model: a Transformers config.json to build a new one from")
    tokenizer_name_or_path: str | None = key(None, "tokenizer (default: the model's)")
    resize_embeddings: bool = key(
        False,
        "give tokens that the model has no embedding for a new row, the mean of the others; else they are refused",
    )
    train_tokenizer: Annotated[int, Field(ge=258)] | None = key(
        None, "instead of a tokenizer: train a byte-level BPE of this many tokens on the demonstrations"
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "of weights, activations and sampling; bfloat16 trains on an fp32 master copy (bf16: true does too)"
    )
    attn_implementation: str = key(
        "auto",
        "auto: on a GPU flex_attention where shared prompts save operations, else flash-attn or torch's varlen; "
        "or Transformers' sdpa, eager, ...",
    )
    trust_remote_code: bool = key(False, "run model code that comes with the model")
    gradient_checkpointing: bool | Literal["selective"] = key(
        False, "recompute layers in the backward pass to save memory; selective: all but their matrix products"
    )
    activation_offloading: bool = key(
        False, "keep what the backward pass needs of the layers in host memory, not on the GPU; nothing on a CPU"
    )
    torch_compile: bool = key(False, "compile the layers for training; takes a C++ compiler, and a minute at first")
    use_peft: bool = key(False, "train a LoRA adapter, one for the policies of all stages; final/ is merged")
    lora_r: Count = key(16, "LoRA rank")
    lora_alpha: Count = key(32, "LoRA alpha; the update is scaled by alpha / rank")
    load_in_4bit: bool = key(
        False,
        "QLoRA: train policy and reward, and score the reference, on a base in 4 bits; the whole one samples",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = key("nf4", "its 4-bit numbers")
    use_bnb_nested_quant: bool = key(False, "quantise its scales too")
    lora_target_modules: str | list[str] = key("all-linear", "modules that get an adapter")

    # The demonstrations
    dataset_name: str | None = key(None, "jsonl, json, parquet or csv file, saved dataset, or hub name (required)")
    dataset_config: str | None = key(None, "configuration of a hub dataset")
    dataset_train_split: str = key("train", "its split to learn from")
    dataset_test_split: str | None = key(None, "its split to hold out (default: a share of the training rows)")
    eval_dataset_name: str | None = key(None, "held-out demonstrations from another source")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = key(0.05, "else this share of the rows is held out")
    max_train_samples: Count | None = key(None, "use the first rows only")
    max_eval_samples: Count | None = key(512, "hold out at most this many rows")
    prompt_template: str = key(
        "### Instruction: {}\n\n### Response: ", "text around a prompt where the tokenizer has no chat template"
    )
    max_length: Count = key(1024, "tokens of prompt and answer; longer answers are cut")
    max_prompt_length: Count = key(512, "tokens of a prompt; longer ones keep their end")

    # SFT: the whole of method sft, a warm start of the others
    sft_epochs: NotNegative | None = key(None, "passes of SFT (default: 1 for method sft, 0 before irft and spin)")
    sft_steps: Annotated[int, Field(ge=0)] | None = key(None, "or optimiser steps of SFT")
    sft_learning_rate: Positive | None = key(None, "its peak learning rate (default: learning_rate)")
    sft_optim: Literal["rmsprop", "adamw_torch"] | None = key(None, "its optimiser (default: optim)")
    sft_per_device_train_batch_size: Count | None = key(
        None, "its demonstrations a device and micro-step (default: per_device_train_batch_size)"
    )

    # IRFT; a list gives one value a stage
    stages: Count = key(3, "T: sample from the policy, then train on the pairs, this many times")
    inner_epochs: Positive | list[Positive] | None = key(None, "K: passes over a stage's pairs (default 1)")
    inner_steps: Count | list[Count] | None = key(None, "K: or optimiser steps a stage")
    prompts_per_stage: Literal["split", "all"] = key("split", "split: the next 1/T of the data; all: every prompt")
    history: Annotated[int, Field(ge=0)] = key(0, "mix in the pairs of this many earlier stages")
    reference: Literal["stage", "initial"] = key("stage", "pi_ref: the policy at the start of the stage, or of the run")
    loss_type: Literal["sigmoid", "hinge", "linear"] = key("sigmoid", "loss of u = beta (rho(y) - rho(y~))")
    beta: Positive | list[Positive] = key(
        0.1, "scale of the log-ratio; of rft and afd, weight of the KL to the reference (1: the learned reward's own)"
    )
    token_weighting: Literal["none", "remaining"] = key(
        "none", "of SFT; remaining: token k of T weighs (T - k) / T (state-action forward KL)"
    )
    nll_weight: NotNegative = key(0.0, "weight of the demonstrations' mean negative log-likelihood a token")

    # RFT and AfD: the reward
    reward_data: Literal["policy_demo", "init_sft", "init_demo", "sft_demo", "preference", "none"] = key(
        "policy_demo",
        "pairs to learn from: demonstrations against the stage's policy, SFT's answers against the initial policy's, "
        "demonstrations against the initial or the SFT policy's, chosen against rejected; none: no reward is learned",
    )
    reward_loss: Literal["sigmoid", "linear", "bce", "bound"] = key(
        "sigmoid", "sigmoid: of a pair's difference; linear; bce: a discriminator; bound: the divergence's own"
    )
    divergence: Literal["reverse_kl", "js", "forward_kl", "alpha"] = key(
        "reverse_kl", "what the policy is to lower: the reward of a discriminator's logit h (reverse_kl: h itself)"
    )
    divergence_alpha: float = key(0.5, "alpha of the alpha-divergence")
    reward_level: Literal["sequence", "token"] = key("sequence", "read the heads at the last token, or at each, summed")
    reward_regularization: Positive = key(0.1, "weight of the squared rewards where reward_loss is linear")
    reward_heads: Count = key(1, "heads of a reward model, an ensemble")
    reward_combine: Literal["mean", "min", "mean_std"] = key(
        "mean", "mean: of a reward's heads, and several rewards add up; min, mean_std: of all heads of all rewards"
    )
    reward_std_weight: NotNegative = key(1.0, "k of mean_std: mean - k std")
    reward_frozen_layers: Annotated[int, Field(ge=0)] = key(
        0, "first layers of the backbone that stay as they are; all: heads on the policy's"
    )
    reward_epochs: Positive | None = key(None, "passes over a stage's pairs (default 1)")
    reward_steps: Count | None = key(None, "or optimiser steps")
    reward_learning_rate: Positive | None = key(None, "its peak learning rate (default: learning_rate)")
    reward_optim: Literal["rmsprop", "adamw_torch"] | None = key(None, "its optimiser (default: optim)")
    reward_model_name_or_path: list[str] = key(
        [], "rewards to add: a reward model's folder or hub name, or POLICY or POLICY,REFERENCE for an implicit one"
    )
    reward_weights: list[float] = key([], "weight of the learned reward and of each added one (default: 1)")

    # RFT and AfD: aligning the policy to it
    align: Literal["rloo", "ppo", "apa", "bon"] = key("rloo", "rloo, ppo, apa, or SFT on the best of n answers")
    num_generations: Annotated[int, Field(ge=2)] = key(4, "n: answers to each prompt")
    align_rounds: Count = key(1, "times a stage samples anew, each for the next share of its prompts")
    kl_in: Literal["loss", "reward", "none"] = key(
        "loss", "where rloo and ppo take beta KL(pi || pi_ref) off; in the reward it is that of the policy that sampled"
    )
    whiten_rewards: bool = key(False, "divide the advantages of rloo and ppo by their standard deviation")
    cliprange: Positive = key(0.2, "clip range of ppo")
    missing_eos_penalty: NotNegative = key(0.0, "taken off the reward of an answer that was cut")
    length_penalty: float = key(0.0, "taken off the reward for each token")

    # Optimisation
    learning_rate: Positive | list[Positive] = key(5e-7, "peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = key(
        "linear", "learning-rate schedule of a stage"
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "share of a stage's steps that warm up")
    optim: Literal["rmsprop", "adamw_torch"] = key("rmsprop", "optimiser; its state starts anew each stage")
    weight_decay: NotNegative = key(0.0, "weight decay")
    router_aux_loss_coef: NotNegative = key(
        0.0, "weight of the load-balancing loss of a policy that is a mixture of experts (0: off, unlike TRL's default)"
    )
    max_grad_norm: NotNegative = key(1.0, "clip the gradient's norm to this (0: off)")
    per_device_train_batch_size: Count = key(8, "pairs a device and micro-step")
    gradient_accumulation_steps: Count = key(1, "times as many pairs an optimiser step")
    max_tokens_per_batch: Count | Literal["auto"] = key(
        "auto",
        "tokens of a forward pass; auto: on a GPU what its memory holds, measured at each phase's second step (half "
        "of it after it ran out), on a CPU about a thousand",
    )

    # What may go wrong: the demonstrations' own likelihood falls
    max_expert_drop: Positive | None = key(
        None,
        "end a stage once the demonstrations' log-likelihood is this many nats below the reference's (default: warn)",
    )
    keep: Literal["last", "best"] = key("last", "which policy becomes final/: the last, or the best held-out one")
    metric_for_best_model: Literal["exact_match", "nll", "reward_accuracy"] = key("nll", "what best means")

    # Sampling
    sampler: Literal["transformers", "vllm"] = key("transformers", "who generates (use_vllm: true means vllm)")
    temperature: NotNegative | list[NotNegative] = key(1.0, "of synthetic answers")
    top_p: Annotated[float, Field(gt=0, le=1)] = key(1.0, "nucleus of synthetic answers")
    top_k: Annotated[int, Field(ge=0)] = key(0, "most likely tokens to draw from (0: all)")
    max_new_tokens: Count = key(256, "tokens of a sampled answer, end token included")
    per_device_eval_batch_size: Count = key(64, "sequences scored or generated at a time")
    vllm_python: str | None = key(None, "interpreter that has vLLM (default: this one)")
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = key(0.9, "share of GPU memory for vLLM")
    vllm_tensor_parallel_size: Count = key(1, "GPUs a vLLM engine")

    # The engine
    zero_stage: Annotated[int, Field(ge=0, le=3)] = key(1, "DeepSpeed ZeRO stage (one process in float32 needs none)")
    deepspeed: str | None = key(None, "DeepSpeed JSON merged over ours")
    save_steps: Annotated[int, Field(ge=0)] = key(100, "optimiser steps between checkpoints (0: none)")
    logging_steps: Count = key(10, "optimiser steps between lines of metrics.jsonl")
    profile: bool = key(False, "write a torch profiler trace of steps 3 to 5 of every phase, trace.json in its folder")
    report_to: list[Literal["tensorboard", "wandb"]] = key([], "also log to these")
    run_name: str | None = key(None, "the run's name on W&B (default: the name of output_dir)")
    project: str | None = key(None, "its project (default: WANDB_PROJECT of the environment, else irlfast)")
    push_to_hub: bool = key(False, "upload final/ at the end; that it can be is tried before training starts")
    hub_model_id: str | None = key(None, "where to (required by push_to_hub)")
    hub_private: bool = key(True, "to a private repository; false: to a public one")

    def at(self, name: str, stage: int) -> Any:
        """The value of a key at a stage: a list has one value a stage."""
        value = getattr(self, name)
        return value[stage] if isinstance(value, list) else value


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def load_config(arguments: list[str], prog: str = "irlfast train") -> tuple[Config, bool]:
    """Config from ``[FILE.yaml | RECIPE] [key=value | --key value | --key=value | --dry_run]...``; whether to run dry.

    Raises:
        InputError: naming every wrong key, what was found and what was expected.
    """
    parser = make_parser(prog)
    tokens = [re.sub(r"^(--)?([A-Za-z][\w-]*)(=|$)", dashed, token) for token in arguments]
    found, unknown = parser.parse_known_args(tokens)
    unexpected = [token for token in unknown if token.startswith("--")] or unknown
    if unexpected:
        raise InputError(unknown_key(unexpected[0].lstrip("-").split("=")[0], "on the command line"))
    given = read_yaml(config_file(found.config)) if found.config else {}
    typed = {
        name: literal(text) for name, text in vars(found).items() if name in {*FIELDS, *ALIASES} and text is not None
    }
    return make_config(given | typed), found.dry_run


def dashed(match: re.Match) -> str:
    """``key=value`` and ``--some-key`` in the one spelling that argparse is given: ``--some_key``."""
    option, name, equals = match.group(1), match.group(2), match.group(3)
    return f"--{name.replace('-', '_')}{equals}" if option or equals else match.group(0)


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [CONFIG.yaml | RECIPE] [key=value | --key value]... [--dry_run]",
        description="Align a language model from demonstrations. Keys, with their [defaults]:",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.add_argument("config", nargs="?", help="YAML file of keys, or a name that `irlfast recipes` lists")
    parser.add_argument("--dry_run", action="store_true", help="show what would be done, with estimates, then stop")
    descriptions = Config.__pydantic_fields__  # type: ignore[attr-defined]
    for name in FIELDS:
        field = descriptions[name]
        text = f"{field.description} [{'none' if field.default is None else repr(field.default)}]"
        boolean = {"nargs": "?", "const": "true"} if isinstance(field.default, bool) else {}
        parser.add_argument(f"--{name}", metavar="VALUE", help=text.replace("%", "%%"), **boolean)  # type: ignore[arg-type]
    for alias in ALIASES:
        parser.add_argument(f"--{alias}", nargs="?", const="true", help=argparse.SUPPRESS)
    return parser


def literal(text: str) -> Any:
    """A command-line value: lists and null as YAML, everything else as text that pydantic converts."""
    return yaml.safe_load(text) if text.startswith("[") or text == "null" else text


def config_file(name: str) -> Path:
    """The file that ``name`` means: itself, else a recipe."""
    path = Path(name).expanduser()
    return path if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1 else recipe(name)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise InputError(f"config file {path}: found {type(given).__name__}, expected lines of 'key: value'")
    return given


def make_config(given: dict[str, Any]) -> Config:
    """Validate keys and values whole, and fill in what follows from them: presets and TRL's spellings."""
    given = dict(given)
    for alias, (name, value) in ALIASES.items():
        if str(given.pop(alias, False)).lower() in ("true", "1", "yes"):
            given[name] = value
    if isinstance(given.get("reward_model_name_or_path"), str):
        given["reward_model_name_or_path"] = [given["reward_model_name_or_path"]]
    if isinstance(given.get("report_to"), str):
        given["report_to"] = [] if given["report_to"] == "none" else [given["report_to"]]
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise InputError(unknown_key(unknown[0], "in the configuration"))
    try:
        config = Config(**(PRESETS.get(str(given.get("method")), {}) | given))
    except ValidationError as error:
        raise InputError(describe(error)) from error
    check(config)
    return config


def unknown_key(name: str, where: str) -> str:
    nearest = difflib.get_close_matches(name, FIELDS, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; --help lists all keys"
    return f"unknown key {name!r} {where}{hint}"


def describe(error: ValidationError) -> str:
    expected: dict[str, list[str]] = {}
    inputs = {}
    for problem in error.errors():
        name = str(problem["loc"][0])
        wanted = problem["msg"].replace("Input should be ", "").split(", unable")[0]
        expected.setdefault(name, []).append(wanted)
        inputs[name] = problem["input"]
    return "; ".join(f"{name}: found {inputs[name]!r}, expected {' or '.join(expected[name])}" for name in expected)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, every default filled in."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys whose values differ, as ``key: old -> new``."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names)
