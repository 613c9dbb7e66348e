"""The start of a run: check the input, read and tokenise the demonstrations, and make the run's folder."""

import datetime
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

from irlfast.common import dist
from irlfast.common.files import InputError, find_path, read_json, write, write_json, write_jsonl, write_text
from irlfast.common.messages import log
from irlfast.config import Config, dump
from irlfast.data.counts import describe_source, dropped_rows
from irlfast.data.encoding import Encoder, make_encoder
from irlfast.data.sets import Sets, read_sets, tokenizer_texts
from irlfast.data.store import Example, Rows, fingerprint, load_examples, save_examples
from irlfast.engine.process_group import init_process_group
from irlfast.models.build import build_model, resize_model
from irlfast.models.configs import embedding_rows, load_model_config, stop_tokens
from irlfast.models.lora import base_and_adapter, check_adapter
from irlfast.models.tokenizers import load_tokenizer, vocabulary_size
from irlfast.runs.hub import create_repository
from irlfast.runs.metrics_log import MetricsLog
from irlfast.runs.output import check_output, lock
from irlfast.runs.run import Run
from irlfast.sampling.rewards import check_tokenizer
from irlfast.sampling.thoughts import mark_of
from irlfast.startup.limits import check_lora, check_rewards, check_sizes, check_vllm

WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def prepare(config: Config, prompts_only: bool = False) -> Run:
    """Prepare a run: its folder, data and tokenizer, and the policy to start from.

    Everything that can be wrong is checked before the first file is written. The main process reads and tokenises the
    demonstrations, while the others wait in ``init_process_group``. With ``prompts_only``, rows need no answer, and no
    row is held out.

    Raises:
        InputError: bad data, no tokenizer or weights, or an ``output_dir`` of another configuration or other data.
    """
    output = Path(config.output_dir).expanduser()
    check_output(output, config)
    if dist.is_main() and output.exists():
        lock(output)
    quiet()
    check_model(config)
    if config.use_vllm:
        check_vllm(config)
    if config.facts.aligns:
        check_rewards(config)
    if config.push_to_hub and dist.is_main():
        create_repository(config)
    written = write_data(config, output, prompts_only) if dist.is_main() else None
    init_process_group()
    encoder, lines = dist.broadcast_object(written)
    names = ["train", "eval", *(["prompts"] if config.prompt_dataset_name else [])]
    train, held_out, *more = (load_examples(output / "data" / f"{name}.safetensors") for name in names)
    log(lines)
    initial, rows = starting_policy(config, output, encoder), Rows(output / "data" / "rows.jsonl")
    return Run(config, output, initial, encoder, train, held_out, MetricsLog(output, config), rows, *more)


def write_data(config: Config, output: Path, prompts_only: bool) -> tuple[Encoder, str]:
    """Tokenise the demonstrations into ``data/``. Return the encoder, and lines that describe the data."""
    earlier = read_json(output / "data.json") if (output / "data.json").exists() else {}
    begun = datetime.datetime.fromisoformat(earlier.get("begun") or datetime.datetime.now().isoformat())
    encoder = read_encoder(config, begun)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as rows:
        sets = read_sets(config, encoder, rows, prompts_only)
        if config.model_name_or_path:
            check_rows(config, encoder, [*sets.train, *sets.held_out, *sets.prompts])
        check_sizes(config, sets.train, [*sets.held_out, *sets.prompts])
        lock(output)
        rows.seek(0)
        write(output / "data" / "rows.jsonl", lambda temporary: copy_lines(rows, temporary))
    facts = {
        "begun": begun.isoformat(),  # the time that the chat template writes
        "fingerprint": fingerprint(sets.train, sets.held_out, sets.prompts),
        "remarks": describe(sets).splitlines(),
        **{name: dict(tally.counts) for name, tally in sets.set_counts.items()},
    }
    if earlier and earlier["fingerprint"] != facts["fingerprint"]:
        raise InputError(f"output_dir {output}: its run began with other demonstrations; expected a new output_dir")
    write_text(output / "config.yaml", dump(config))
    examples_of = {"train": sets.train, "eval": sets.held_out} | ({"prompts": sets.prompts} if sets.prompts else {})
    for name, examples in examples_of.items():
        save_examples(output / "data" / f"{name}.safetensors", examples)
    dropped = [*dropped_rows(sets.source_counts), *(row for tally in sets.set_counts.values() for row in tally.dropped)]
    write_jsonl(output / "data" / "dropped.jsonl", dropped)
    write_json(output / "data.json", facts)
    return encoder, describe(sets)


def copy_lines(lines: IO[str], path: Path) -> None:
    with path.open("w", encoding="utf-8") as copied:
        shutil.copyfileobj(lines, copied)


def check_model(config: Config) -> None:
    """Check that the model can be trained as configured, long before its weights are loaded.

    Raises:
        InputError: it cannot; the message names the key.
    """
    model_config = load_model_config(config)
    text = model_config.get_text_config()
    backbone = config.reward_backbone
    judge = load_model_config(config, backbone).get_text_config() if backbone else text
    frozen, layers = config.reward_frozen_layers, judge.num_hidden_layers
    if frozen > layers:
        raise InputError(f"reward_frozen_layers: found {frozen}, but the model has {layers} layers")
    balancing = config.router_aux_loss_coef
    if balancing and not hasattr(text, "output_router_logits"):
        raise InputError(f"router_aux_loss_coef: found {balancing}, but a {text.model_type} has no router; expected 0")
    positions = min(getattr(each, "max_position_embeddings", None) or math.inf for each in (text, judge))
    thought = config.max_thought_tokens + 1 if config.facts.thinks else 0
    longest = max(config.max_length, config.max_prompt_length + config.max_new_tokens) + thought
    if config.facts.has_teacher and config.max_length + config.max_new_tokens > positions:
        raise InputError(
            f"max_length: found {config.max_length}, but the model has {positions} positions; expected at most "
            f"{positions - config.max_new_tokens}, so that a sampled answer fits behind the teacher's prompt"
        )
    if longest > positions:
        raise InputError(
            f"max_length {config.max_length}, or max_prompt_length {config.max_prompt_length} + max_new_tokens "
            f"{config.max_new_tokens}{f', and max_thought_tokens {thought - 1}' if thought else ''}: found up to "
            f"{longest} tokens, but the model has {positions} positions"
        )
    if config.model_name_or_path:
        check_weights(config)
    if config.use_peft:
        check_lora(config, model_config)


def check_weights(config: Config) -> None:
    """Check that the given model has weights, and that training can continue its adapter if it is one."""
    base, adapter = base_and_adapter(str(config.model_name_or_path))
    for folder in (find_path(base), adapter):
        if folder and not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
            raise InputError(
                f"model_name_or_path {folder}: found no weights, expected {' or '.join(WEIGHTS[:2])} files"
            )
    if adapter and not config.use_peft:
        raise InputError(
            f"model_name_or_path: found the adapter {adapter} without use_peft; expected use_peft: true, to continue "
            "it, or a whole model, such as final/ of its run"
        )
    if adapter:
        check_adapter(adapter, config)


def read_encoder(config: Config, begun: datetime.datetime) -> Encoder:
    """Load the run's tokenizer, or train it, and make the encoder of conversations."""
    tokenizer = load_tokenizer(config, tokenizer_texts(config) if config.train_tokenizer else [])
    encoder = make_encoder(tokenizer, config, begun, stop_tokens(config))
    if config.reward_backbone:
        check_tokenizer(f"reward_backbone {config.reward_backbone}", config.reward_backbone, encoder, config)
    if config.facts.thinks:
        mark_of(config, encoder)
    return encoder


def check_rows(config: Config, encoder: Encoder, examples: list[Example]) -> None:
    """Check that the model has an embedding for every token in use, or will get one.

    Raises:
        InputError: a token of an example has none, or one of the tokenizer's own, apart from added tokens.
    """
    tokens, rows = vocabulary_size(encoder.tokenizer), embedding_rows(config)
    if tokens <= rows:
        return
    found_tokens = f"tokenizer: found {tokens:,} tokens, but the model's embedding has {rows:,} rows"
    if config.resize_embeddings and config.use_peft:
        raise InputError(
            f"{found_tokens}; expected resize_embeddings without use_peft, whose adapter leaves new rows untrained"
        )
    ids = (part for x in examples for part in (x.prompt_ids, x.answer_ids, x.rejected_ids) if part is not None)
    used = max(int(max(part)) for part in ids if len(part))
    if config.resize_embeddings:
        log(f"{found_tokens}: {tokens - rows:,} new ones, the mean of the others")
    elif encoder.tokenizer.vocab_size > rows or max(used, encoder.end_id) >= rows:
        raise InputError(f"{found_tokens}; expected the model's own tokenizer, or resize_embeddings: true")
    else:
        log(f"{found_tokens}; no example has one of the {tokens - rows:,} tokens without a row")


def starting_policy(config: Config, output: Path, encoder: Encoder) -> Path | str:
    """Return the given model, or ``initial/policy``: a new model, or the given one with more embeddings."""
    given = config.model_name_or_path
    if given and not (config.resize_embeddings and vocabulary_size(encoder.tokenizer) > embedding_rows(config)):
        return find_path(given) or given
    built = output / "initial" / "policy"
    if dist.is_main() and not built.exists():
        make = resize_model if given else build_model
        make(config, encoder.tokenizer, built)
    dist.barrier()
    return built


def describe(sets: Sets) -> str:
    """Describe what was read, kept, cut and left out, one line each."""
    lines = [describe_source(source) for source in sets.source_counts]
    labels = {"train": "demonstrations", "eval": "held out", "prompts": "prompts without answers"}
    for name, tally in sets.set_counts.items():
        counts = tally.counts
        losses = [f"{counts[key]:,} {key.replace('_', ' ')}" for key in counts if key not in KEPT and counts[key]]
        lines.append(
            f"{labels[name]}: {counts['kept']:,} of {counts['rows']:,} rows, "
            f"{counts['prompt_tokens']:,} prompt tokens, {counts['answer_tokens']:,} answer tokens"
            + (f" ({', '.join(losses)})" if losses else "")
        )
        lines += [f"{labels[name]}: {count:,} {remark}" for remark, count in tally.remarks.items() if count]
    if "eval" not in sets.set_counts and sets.held_out:
        lines.append(f"held out: {len(sets.held_out):,} of these rows")
    return "\n".join(lines)


KEPT = ("rows", "kept", "prompt_tokens", "answer_tokens", "tokenised_apart")


def quiet() -> None:
    """Silence the libraries' progress bars and notices, which would break ours."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for library in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
