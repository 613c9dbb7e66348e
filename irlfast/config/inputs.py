"""The keys of what a run begins with: its method and folder, its model, its demonstrations."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from irlfast.config.types import Columns, Count, Datasets, MethodName, key


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Inputs:
    """The first keys of :class:`irlfast.config.schema.Config`."""

    # The run
    method: MethodName = key(
        "irft",
        "The algorithm: irft; spin (irft with the defaults of SPIN); t_spin (spin without a reference, also against "
        "the first policy's answers); dpo (chosen against rejected answers); rft (learn a reward, then align the "
        "policy to it); afd (rft with a discriminator); gad (rft whose reward learns in every round, with GRPO); "
        "r_airl (gad with a discriminator, rewards and advantages per token); sdft (learn from itself with the "
        "demonstration in its prompt); reasoning (think before the demonstration); reward (a reward model alone); sft.",
    )
    output_dir: str = key("runs/irft", "The folder of the run. The same command resumes the run that it holds.")
    seed: Annotated[int, Field(ge=0)] = key(0, "Seed of new weights, shuffling and sampling.")

    # The model
    model_name_or_path: str | None = key(None, "The policy to start from: a folder or a name on the hub.")
    model_revision: str = key("main", "Branch, tag or commit on the hub of the model, its tokenizer and its config.")
    config_name: str | None = key(
        None, "A Transformers config.json to build a new model from, in place of model_name_or_path."
    )
    tokenizer_name_or_path: str | None = key(None, "The tokenizer (default: that of the model).")
    resize_embeddings: bool = key(
        False,
        "Give each token that the model has no embedding for a new row, the mean of the others. Without it, such a "
        "tokenizer is refused.",
    )
    allow_missing_weights: bool = key(
        False,
        "Give tensors that model_name_or_path has no weights for new, seeded values, in initial/policy. Without it, "
        "such a model is refused.",
    )
    train_tokenizer: Annotated[int, Field(ge=258)] | None = key(
        None, "Train a byte-level BPE tokenizer with this many tokens on the demonstrations."
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "Type of weights, activations and sampling. bfloat16 trains on an fp32 master copy."
    )
    attn_implementation: str = key(
        "auto",
        "The attention: one of Transformers' (sdpa, eager, ...), or auto. On a GPU, auto takes flex_attention where "
        "shared prompts save operations, else flash-attn or torch's varlen attention.",
    )
    trust_remote_code: bool = key(False, "Run Python code that comes with the model.")
    gradient_checkpointing: bool | Literal["selective"] = key(
        False,
        "Recompute layers in the backward pass to save memory. selective recomputes all but their matrix products.",
    )
    activation_offloading: bool = key(
        False, "Keep the activations that the backward pass needs in host memory, not on the GPU. No effect on a CPU."
    )
    torch_compile: bool = key(
        False, "Compile the layers for training. It needs a C++ compiler, and takes a minute at the start."
    )
    use_peft: bool = key(False, "Train a LoRA adapter, the same one in all stages. final/ has it merged.")
    lora_r: Count = key(16, "Rank of LoRA.")
    lora_alpha: Count = key(32, "Alpha of LoRA. Its update is multiplied by alpha / rank.")
    load_in_4bit: bool = key(
        False,
        "QLoRA: train policy and reward, and score the reference, on a base in 4 bits. Sampling uses the whole base.",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = key("nf4", "The 4-bit number format of QLoRA.")
    use_bnb_nested_quant: bool = key(False, "Quantise the scales of QLoRA, too.")
    lora_target_modules: str | list[str] = key(
        "all-linear", "The modules that get a LoRA adapter. all-linear leaves out the routers of a mixture of experts."
    )

    # The demonstrations
    dataset_name: Datasets | None = key(
        None,
        "The demonstrations (required): a file (jsonl, ndjson, json, csv, tsv, parquet, arrow; also with .gz or .zst), "
        "a folder or pattern of such files, a saved dataset or a hub name; or a list of these or of {name, weight, "
        "split, config, columns}. weight is a share of the mix, which ends when one source has no more rows.",
    )
    dataset_config: str | None = key(None, "Configuration of a hub dataset, or a folder within a dataset's folder.")
    dataset_revision: str | None = key(None, "Commit, tag or branch of a hub dataset.")
    dataset_train_split: str = key("train", "The split to learn from. A single file is the split train.")
    dataset_test_split: str | None = key(None, "The split to hold out (default: a share of the training rows).")
    eval_dataset_name: Datasets | None = key(None, "Held-out demonstrations from another source, or from several.")
    prompt_dataset_name: Datasets | None = key(
        None, "Prompts without answers, which the policy of rft, afd or gad answers too. No reward learns from them."
    )
    columns: Columns = key(
        {},
        "Names in the file of prompt, answer, rejected, messages, text, system, tools or label, as {prompt: question}.",
    )
    learn_turns: Literal["first", "last", "all"] = key(
        "last", "The assistant turns of a conversation to learn (default of method sft: all)."
    )
    bad_rows: Literal["refuse", "skip", "mend"] = key(
        "refuse",
        "Rows that cannot be read: refuse the dataset, skip and count such rows, or mend them where possible.",
    )
    streaming: bool = key(False, "Read hub datasets row by row, without a download. Local files are always read so.")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = key(
        0.05, "Share of the training rows to hold out, where no other key says what is held out."
    )
    max_train_samples: Count | None = key(None, "Use the first rows only, this many.")
    max_eval_samples: Count | None = key(512, "Hold out at most this many rows.")
    eval_overlap: Literal["refuse", "drop", "allow"] = key(
        "refuse", "Held-out rows that are also training rows: refuse the dataset, drop or allow such rows."
    )
    chat_template: str | None = key(
        None, "A file, the text of a template, or the name of one of the tokenizer's (default: the tokenizer's own)."
    )
    chat_template_kwargs: dict[str, Any] = key({}, "Values that the chat template reads, such as enable_thinking.")
    prompt_template: str = key(
        "### Instruction: {}\n\n### Response: ",
        "Text around a prompt where the tokenizer has no chat template. final/ has it as a chat template.",
    )
    system_prompt: str | None = key(None, "System text of conversations that have none.")
    split_special_tokens: bool = key(
        True, "Special tokens that rows spell stay text. false: they become tokens, which can end a turn."
    )
    max_length: Count = key(1024, "Most tokens of a prompt with its answer.")
    max_prompt_length: Count = key(512, "Most tokens of a prompt.")
    overlong: Literal["cut", "drop"] = key(
        "cut", "Rows over a limit: cut leaves out a prompt's first turns and an answer's end, drop leaves out the row."
    )
