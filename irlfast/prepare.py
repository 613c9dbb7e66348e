"""The start of a run: check everything that can be wrong before the first file is written."""

import logging
import os
from pathlib import Path
from typing import Any

from irlfast import dist
from irlfast.config import Config, dump
from irlfast.data import (
    Example,
    Format,
    encode,
    fingerprint,
    load_examples,
    make_format,
    read_splits,
    render_texts,
    save_examples,
)
from irlfast.files import InputError, find, read_json, write_json, write_text
from irlfast.hub import try_upload
from irlfast.limits import check_lora, check_rewards, check_sizes, check_vllm
from irlfast.lora import base_and_adapter, check_adapter
from irlfast.metrics import Log, say
from irlfast.model import build_model, count_tokens, load_model_config, load_tokenizer, resize_model, rows_of
from irlfast.output import check_output, hold
from irlfast.run import Run

WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def prepare(config: Config) -> Run:
    """The run's data, tokenizer, folder, and the policy that it starts from.

    The main process alone reads and tokenises, while the others wait in ``dist.start``; all map what it wrote.

    Raises:
        InputError: bad data, no tokenizer or weights, or an ``output_dir`` of another configuration or other data.
    """
    output = Path(config.output_dir).expanduser()
    check_output(output, config)
    if dist.is_main() and output.exists():
        hold(output)
    quiet()
    check_model(config)
    if config.sampler == "vllm":
        check_vllm(config)
    if config.method in ("rft", "afd"):
        check_rewards(config)
    if config.push_to_hub and dist.is_main():
        try_upload(config)
    found = write_data(config, output) if dist.is_main() else None
    dist.start()
    form, counts = dist.from_main(found)
    train, held_out = (load_examples(output / "data" / f"{name}.safetensors") for name in ("train", "eval"))
    say(describe(counts))
    return Run(config, output, starting_policy(config, output, form), form, train, held_out, Log(output, config))


def write_data(config: Config, output: Path) -> tuple[Format, dict[str, Any]]:
    """Tokenise the demonstrations into ``data/``; returns their format and counts."""
    form, train, held_out, counts = read_data(config)
    check_sizes(config, train, held_out)
    hold(output)
    counts["fingerprint"] = fingerprint(train, held_out)
    known = read_json(output / "data.json") if (output / "data.json").exists() else counts
    if known["fingerprint"] != counts["fingerprint"]:
        raise InputError(f"output_dir {output}: its run began with other demonstrations; expected a new output_dir")
    write_text(output / "config.yaml", dump(config))
    for name, examples in (("train", train), ("eval", held_out)):
        save_examples(output / "data" / f"{name}.safetensors", examples)
    write_json(output / "data.json", counts)
    return form, counts


def check_model(config: Config) -> None:
    """Whether there will be a model to train, long before it is loaded."""
    model_config = load_model_config(config)
    text = model_config.get_text_config()
    frozen, layers = config.reward_frozen_layers, text.num_hidden_layers
    if frozen > layers:
        raise InputError(f"reward_frozen_layers: found {frozen}, but the model has {layers} layers")
    balance = config.router_aux_loss_coef
    if balance and not hasattr(text, "output_router_logits"):
        raise InputError(f"router_aux_loss_coef: found {balance}, but a {text.model_type} has no router; expected 0")
    positions = getattr(text, "max_position_embeddings", None)
    longest = max(config.max_length, config.max_prompt_length + config.max_new_tokens)
    if positions and longest > positions:
        raise InputError(
            f"max_length {config.max_length}, or max_prompt_length {config.max_prompt_length} + max_new_tokens "
            f"{config.max_new_tokens}: found up to {longest} tokens, but the model has {positions} positions"
        )
    if config.model_name_or_path:
        check_weights(config)
    if config.use_peft:
        check_lora(config, model_config)


def check_weights(config: Config) -> None:
    """Whether the given model has weights, and training can go on with an adapter."""
    base, adapter = base_and_adapter(str(config.model_name_or_path))
    for folder in (find(base), adapter):
        if folder and not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
            raise InputError(
                f"model_name_or_path {folder}: found no weights, expected {' or '.join(WEIGHTS[:2])} files"
            )
    if adapter and not config.use_peft:
        raise InputError(
            f"model_name_or_path: found the adapter {adapter} without use_peft; expected use_peft: true, to go on with "
            "it, or a whole model, as is its run's final/"
        )
    if adapter:
        check_adapter(adapter, config)


def read_data(config: Config) -> tuple:
    """Format, examples to learn from, held-out ones, and the counts of both."""
    demonstrations, others = read_splits(config)
    form = make_format(load_tokenizer(config, render_texts(demonstrations, config.prompt_template)), config)
    train, train_counts = encode(demonstrations, form, config)
    held_out, held_out_counts = encode(others, form, config)
    for name, examples in (("training", train), ("held-out", held_out)):
        if not examples:
            raise InputError(f"dataset {config.dataset_name}: no {name} row has an answer; expected demonstrations")
    if config.model_name_or_path:
        check_rows(config, form, [*train, *held_out])
    prompts = {bytes(example.prompt_ids) for example in train}
    held_out_counts["prompts_also_in_train"] = sum(bytes(example.prompt_ids) in prompts for example in held_out)
    return form, train, held_out, {"train": train_counts, "eval": held_out_counts}


def check_rows(config: Config, form: Format, examples: list[Example]) -> None:
    """Whether the model has an embedding for every token in use, or is to get it.

    Raises:
        InputError: a token of an example, or one of the tokenizer's own that was not added to it, has none.
    """
    tokens, rows = count_tokens(form.tokenizer), rows_of(config)
    if tokens <= rows:
        return
    found = f"tokenizer: found {tokens:,} tokens, but the model's embedding has {rows:,} rows"
    if config.resize_embeddings and config.use_peft:
        raise InputError(
            f"{found}; expected resize_embeddings without use_peft, whose adapter leaves new rows untrained"
        )
    ids = (part for x in examples for part in (x.prompt_ids, x.answer_ids, x.rejected_ids) if part is not None)
    used = max(int(max(part)) for part in ids if len(part))
    if config.resize_embeddings:
        say(f"{found}: {tokens - rows:,} new ones, the mean of the others")
    elif form.tokenizer.vocab_size > rows or max(used, form.end_id) >= rows:
        raise InputError(f"{found}; expected the model's own tokenizer, or resize_embeddings: true")
    else:
        say(f"{found}; no example has one of the {tokens - rows:,} tokens without a row")


def starting_policy(config: Config, output: Path, form: Format) -> Path | str:
    """The given model, or in ``initial/policy`` with its tokenizer a new one, or the given one with more embeddings."""
    given = config.model_name_or_path
    if given and not (config.resize_embeddings and count_tokens(form.tokenizer) > rows_of(config)):
        return find(given) or given
    built = output / "initial" / "policy"
    if dist.is_main() and not built.exists():
        make = resize_model if given else build_model
        make(config, form.tokenizer, built)
    dist.barrier()
    return built


def describe(counts: dict) -> str:
    """The data in a line each: what is there, and what had to be dropped or cut."""
    lines = []
    for name, label in (("train", "demonstrations"), ("eval", "held out")):
        part = counts[name]
        losses = [f"{part[key]} {key.replace('_', ' ')}" for key in LOSSES if part.get(key)]
        lines.append(
            f"{label}: {part['kept']:,} of {part['rows']:,} rows, {part['prompt_tokens']:,} prompt tokens, "
            f"{part['answer_tokens']:,} answer tokens" + (f" ({', '.join(losses)})" if losses else "")
        )
    return "\n".join(lines)


LOSSES = ("empty_answers", "duplicates", "cut_prompts", "cut_answers", "cut_at_end_token", "prompts_also_in_train")


def quiet() -> None:
    """Libraries' own progress bars and notices would tear ours."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for library in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
