"""The start of a run: check the input, read and tokenise the demonstrations, and make the run's folder."""

import atexit
import contextlib
import datetime
import gc
import itertools
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from irlfast.common import dist, stop
from irlfast.common.artefacts import intact, keep_json, keep_text
from irlfast.common.files import InputError, find_path, home_path, read_json
from irlfast.common.messages import log
from irlfast.common.secrets import redacted
from irlfast.config import Config, dump
from irlfast.data.encoding import Encoder, make_encoder
from irlfast.data.sets import read_sets, tokenizer_texts
from irlfast.data.store import NONE, Examples, Rows
from irlfast.engine.deepspeed_engine import check_deepspeed
from irlfast.engine.process_group import init_process_group
from irlfast.models.build import build_model, complete_model, resize_model
from irlfast.models.configs import embedding_rows, load_model_config, stop_tokens
from irlfast.models.lora import base_and_adapter, check_adapter
from irlfast.models.tokenizers import load_tokenizer, load_trained, vocabulary_size
from irlfast.runs.hub import create_repository
from irlfast.runs.lock import lock
from irlfast.runs.metrics_log import MetricsLog
from irlfast.runs.output import check_output
from irlfast.runs.run import Run
from irlfast.runs.shared import check_shared
from irlfast.runs.starts import note_start
from irlfast.sampling.rewards import check_tokenizer
from irlfast.sampling.thoughts import mark_of
from irlfast.startup.data import is_same, is_there, keep_data, load_data, origin_of
from irlfast.startup.inputs import keep_inputs, read_inputs
from irlfast.startup.limits import check_lora, check_rewards, check_sizes, check_vllm

OBJECTS = 100_000  # new objects before the garbage collector runs while rows are read
WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def prepare(config: Config, prompts_only: bool = False) -> Run:
    """Prepare a run: its folder, data and tokenizer, and the policy to start from.

    Everything that can be wrong is checked before the first file is written. The main process reads and tokenises the
    demonstrations, while the others wait. With ``prompts_only``, rows need no answer, and no
    row is held out.

    Raises:
        InputError: bad data, no tokenizer or weights, or an ``output_dir`` of another configuration or other data.
    """
    output = home_path(config.output_dir)
    stop.grant(config.preemption_grace)
    changes = check_output(output, config) if dist.is_main() else []
    check_shared(output)
    quiet()
    check_model(config)
    check_deepspeed(config)
    if config.use_vllm:
        check_vllm(config)
    if config.facts.aligns:
        check_rewards(config)
    if config.push_to_hub and dist.is_main():
        create_repository(config)
    written = write_data(config, output, prompts_only) if dist.is_main() else None
    init_process_group(config.stall_timeout)
    if dist.is_main():
        note_start(output, changes)
    encoder, lines = dist.broadcast_object(written)
    train, held_out, *more = load_data(config, output)
    for line in lines:
        log(line)
    prompts = more[0] if more else NONE
    initial, rows = starting_policy(config, output, encoder), Rows(output / "data" / "rows.jsonl")
    return Run(config, output, initial, encoder, train, held_out, MetricsLog(output, config), rows, prompts)


def write_data(config: Config, output: Path, prompts_only: bool) -> tuple[Encoder, list[str]]:
    """Prepare ``data/``, or find it as it would be. Return the encoder, and lines that describe the data."""
    earlier = read_json(output / "data.json") if intact(output / "data.json") else {}
    begun = datetime.datetime.fromisoformat(earlier.get("begun") or datetime.datetime.now().isoformat())
    there = bool(earlier) and is_there(config, output)
    inputs = read_inputs(config, output)
    encoder = read_encoder(config, begun, output / "data" / "tokenizer.json" if there else None)
    earlier_origin = earlier.get("made_from") or {}
    origin = origin_of(config, encoder, prompts_only, earlier_origin)
    reused = there and is_same(origin, earlier_origin)
    gc.freeze()  # or the garbage collector looks at all imported modules again for every few thousand rows
    atexit.register(gc.unfreeze)  # or modules in cycles stay at the end, and Triton's binding lists them as leaks
    with tempfile.TemporaryFile() as rows:
        with collecting_rarely():
            sets = None if reused else read_sets(config, encoder, rows, prompts_only)
        train, *others = sets[:3] if sets else load_data(config, output)
        if config.model_name_or_path:
            check_rows(config, encoder, train, *others)
        check_sizes(config, train, *others)
        lock(output)
        keep_text(output / "config.yaml", dump(config))
        keep_inputs(inputs, output)
        facts = {"begun": begun.isoformat(), "made_from": origin}  # ``begun`` is the time that the chat template writes
        if sets:
            return encoder, keep_data(config, output, encoder, sets, rows, facts)
    if origin != earlier_origin:  # a file of rows has another time
        keep_json(output / "data.json", redacted(earlier | facts))
    return encoder, [
        *earlier["remarks"],
        f"{output / 'data'}: used again, as nothing that it was made from has changed",
    ]


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
    check_positions(config, text, judge)
    if config.model_name_or_path:
        check_weights(config)
    if config.use_peft:
        check_lora(config, model_config)


def check_positions(config: Config, *models: Any) -> None:
    """Check that the longest sequences fit the positions of all models, which are given as Transformers configs.

    Raises:
        InputError: they do not.
    """
    positions = min(getattr(each, "max_position_embeddings", None) or math.inf for each in models)
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


def check_weights(config: Config) -> None:
    """Check that the given model has weights, and that training can continue its adapter if it is one."""
    adapter = check_weights_exist("model_name_or_path", str(config.model_name_or_path))
    if adapter and not config.use_peft:
        raise InputError(
            f"model_name_or_path: found the adapter {adapter} without use_peft; expected use_peft: true, to continue "
            "it, or a whole model, such as final/ of its run"
        )
    if adapter:
        check_adapter(adapter, config)


def check_weights_exist(what: str, name: Path | str) -> Path | None:
    """Check that a model's folder, and its base's if it is an adapter, has weights. Return the adapter's folder.

    Raises:
        InputError: one has none; the message begins with ``what``.
    """
    base, adapter = base_and_adapter(name)
    for folder in (find_path(base), adapter):
        if folder and not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
            raise InputError(f"{what} {folder}: found no weights, expected {' or '.join(WEIGHTS[:2])} files")
    return adapter


def read_encoder(config: Config, begun: datetime.datetime, trained: Path | None = None) -> Encoder:
    """Load the run's tokenizer, or train it, and make the encoder of conversations.

    ``trained`` is the file of the tokenizer that the run has trained, if it has.
    """
    if config.train_tokenizer and trained:
        tokenizer = load_trained(trained)
    else:
        tokenizer = load_tokenizer(config, tokenizer_texts(config) if config.train_tokenizer else [])
    encoder = make_encoder(tokenizer, config, begun, stop_tokens(config))
    if config.reward_backbone:
        check_tokenizer(f"reward_backbone {config.reward_backbone}", config.reward_backbone, encoder, config)
    if config.facts.thinks:
        mark_of(config, encoder)
    return encoder


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """Let the garbage collector wait for more objects than a thousand rows have: their objects are in no cycles."""
    usual = gc.get_threshold()
    gc.set_threshold(OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def check_rows(config: Config, encoder: Encoder, *sets: Examples) -> None:
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
    ids = (
        part
        for x in itertools.chain(*sets)
        for part in (x.prompt_ids, x.answer_ids, x.rejected_ids)
        if part is not None
    )
    used = max(int(max(part)) for part in ids if len(part))
    if config.resize_embeddings:
        log(f"{found_tokens}: {tokens - rows:,} new ones, the mean of the others")
    elif encoder.tokenizer.vocab_size > rows or max(used, encoder.end_id) >= rows:
        raise InputError(f"{found_tokens}; expected the model's own tokenizer, or resize_embeddings: true")
    else:
        log(f"{found_tokens}; no example has one of the {tokens - rows:,} tokens without a row")


def starting_policy(config: Config, output: Path, encoder: Encoder) -> Path | str:
    """Return the given model, or ``initial/policy``: a new model, or the given one with what it lacks."""
    given, make = config.model_name_or_path, build_model
    if given and config.resize_embeddings and vocabulary_size(encoder.tokenizer) > embedding_rows(config):
        make = resize_model
    elif given and config.allow_missing_weights:
        make = complete_model
    elif given:
        return find_path(given) or given
    built = output / "initial" / "policy"
    if dist.is_main() and not intact(built):
        make(config, encoder.tokenizer, built)
    dist.barrier()
    return built


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
