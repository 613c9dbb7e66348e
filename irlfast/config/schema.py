"""Every key of a run, in one frozen dataclass. The description of a key is its ``--help`` line.

Pydantic checks types, bounds and names: it names every wrong key with what it found, and reads YAML's ``5e-7`` as the
number it is. DeepSpeed depends on Pydantic anyway.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from irlfast.config.methods import METHOD_FACTS, MethodFacts

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


def key(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


Columns = dict[Literal["prompt", "answer", "rejected", "messages", "text", "system", "tools", "label"], str]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Dataset:
    """One of several sources of ``dataset_name``; what is left out is as the keys of the run say."""

    name: str
    weight: Positive | None = None
    split: str | None = None
    config: str | None = None
    columns: Columns | None = None


Datasets = str | list[str | Dataset]


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
    dataset_name: Datasets | None = key(
        None,
        "a file (jsonl, ndjson, json, csv, tsv, parquet, arrow; also with .gz or .zst), a folder or pattern of such "
        "files, a saved dataset or a hub name; or a list of these or of {name, weight, split, config, columns}: weight "
        "is a share of the mix, which ends with the first source that has no more rows (required)",
    )
    dataset_config: str | None = key(None, "configuration of a hub dataset, or a folder within a dataset's folder")
    dataset_revision: str | None = key(None, "commit, tag or branch of a hub dataset")
    dataset_train_split: str = key("train", "its split to learn from; a single file is the split train")
    dataset_test_split: str | None = key(None, "its split to hold out (default: a share of the training rows)")
    eval_dataset_name: Datasets | None = key(None, "held-out demonstrations from another source, or a list of them")
    columns: Columns = key(
        {},
        "names in the file of prompt, answer, rejected, messages, text, system, tools or label, as {prompt: question}",
    )
    learn_turns: Literal["first", "last", "all"] = key(
        "last", "assistant turns of a conversation to learn (default of method sft: all)"
    )
    bad_rows: Literal["refuse", "skip", "mend"] = key(
        "refuse",
        "rows that cannot be read: refuse the dataset, skip and count them, or mend what can be and skip the others",
    )
    streaming: bool = key(False, "read hub datasets row by row, without a download; local files always are")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = key(0.05, "else this share of the rows is held out")
    max_train_samples: Count | None = key(None, "use the first rows only")
    max_eval_samples: Count | None = key(512, "hold out at most this many rows")
    eval_overlap: Literal["refuse", "drop", "allow"] = key(
        "refuse", "held-out rows that are also training rows: refuse them, leave them out, or allow them"
    )
    chat_template: str | None = key(
        None, "a file, a template's text, or the name of one of the tokenizer's (default: the tokenizer's own)"
    )
    chat_template_kwargs: dict[str, Any] = key({}, "values that the chat template reads, such as enable_thinking")
    prompt_template: str = key(
        "### Instruction: {}\n\n### Response: ",
        "text around a prompt where the tokenizer has no chat template; final/ has it as a chat template",
    )
    system_prompt: str | None = key(None, "system text of conversations that have none")
    split_special_tokens: bool = key(
        True, "special tokens that rows spell stay text; false: they become tokens, as they can end a turn"
    )
    max_length: Count = key(1024, "tokens of prompt and answer")
    max_prompt_length: Count = key(512, "tokens of a prompt")
    overlong: Literal["cut", "drop"] = key(
        "cut", "cut: long prompts lose their first turns, long answers their end; drop: such rows are left out"
    )

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
    reward_overlong: Literal["cut", "drop"] = key(
        "cut", "what an added reward model with a limit reads of a longer text: its end; drop: leave its prompt out"
    )
    reward_function: list[str] = key(
        [], "Python functions to add, package.module:function or file.py:function, called as TRL calls its own"
    )
    reward_weights: list[float] = key([], "weight of the learned reward, of each added one, each function (default: 1)")

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

    @property
    def facts(self) -> MethodFacts:
        """What the method needs and leaves."""
        return METHOD_FACTS[self.method]


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
