"""Compare models on prompts: ``irlfast evaluate MODEL [MODEL ...] --dataset FILE [key=value]...``.

    irlfast evaluate HuggingFaceH4/zephyr-7b-sft-full runs/spin/final --dataset prompts.jsonl output_dir=runs/compared
    irlfast evaluate runs/irft --dataset test.jsonl            # every policy of a run, the first one first
    irlfast evaluate runs/irft/final --leaderboard             # the Open LLM Leaderboard's tasks, by lm-eval

A model is a folder, a name on the hub, or a run, which stands for all its policies. The first model is the baseline.
Every model answers every prompt greedily and ``num_generations`` times at random, and scores the demonstrations.
``docs/evaluation.md`` explains the figures. The keys are those of training; a run gives its own keys of texts and
lengths.

Prompts go through the models in chunks of :data:`irlfast.evaluation.prompts.CHUNK`, and rows are written in parts of
256. The same command resumes, and skips the parts that exist.
"""

import argparse
import dataclasses
import datetime
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from irlfast.common import dist, stop, watchdog
from irlfast.common.artefacts import intact, keep_jsonl, keep_text
from irlfast.common.command import run_command, writing_to
from irlfast.common.files import InputError, home_path, read_json, remove, remove_temporary, write_text
from irlfast.common.messages import log
from irlfast.common.secrets import redacted, restored
from irlfast.config import Config, make_config
from irlfast.config.read import make_parser, parse_arguments, read_config
from irlfast.data.counts import SetCounts
from irlfast.data.encoding import Encoder
from irlfast.data.hashes import Hashes
from irlfast.data.store import NONE, Rows, load_examples
from irlfast.engine.process_group import destroy_process_group, init_process_group
from irlfast.evaluation.judge import JudgeSettings, add_judge_options, judge_models, judge_settings
from irlfast.evaluation.leaderboard import add_leaderboard_options, show_leaderboard
from irlfast.evaluation.measure import Subject, measure
from irlfast.evaluation.models import Model, encoders_of, fingerprint_of, keys_of_runs, models_of, seeds_among
from irlfast.evaluation.prompts import CHUNK, PART, Reader, chunk_path, write_prompts
from irlfast.evaluation.scores import check_scores
from irlfast.evaluation.table import write_figures
from irlfast.evaluation.terminal import print_figures
from irlfast.methods.stages import sampling
from irlfast.models.configs import load_model_config
from irlfast.reports.evaluation import evaluation_text
from irlfast.runs.lock import lock
from irlfast.runs.metrics_log import MetricsLog
from irlfast.runs.output import differences
from irlfast.runs.run import Run
from irlfast.runs.shared import check_shared
from irlfast.runs.starts import note_start
from irlfast.startup.limits import check_vllm
from irlfast.startup.prepare import check_positions, check_weights_exist, quiet

OF_MODELS = ("models", "seeds", "weights")  # of evaluation.yaml; its others are the keys of the configuration
IN_PROMPTS = ("prompt", "expert")  # keys of a row that prompts.jsonl has

LISTED = """output_dir seed dtype attn_implementation trust_remote_code model_revision
    dataset_name dataset_config dataset_revision dataset_train_split dataset_test_split columns learn_turns bad_rows
    streaming max_eval_samples chat_template chat_template_kwargs prompt_template system_prompt split_special_tokens
    max_length max_prompt_length overlong num_generations temperature top_p top_k max_new_tokens
    per_device_eval_batch_size use_vllm vllm_python vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_server
    vllm_server_requests scorer reward_model_name_or_path reward_overlong implicit_reward_policy
    implicit_reward_reference reward_function preemption_grace""".split()  # the keys in the help


def evaluate(models: Sequence[Model], config: Config, judge: JudgeSettings | None = None) -> None:
    """Measure all models on all prompts, then compare them. Every process calls this function."""
    output = home_path(config.output_dir)
    stop.grant(config.preemption_grace)
    prepared = prepare(models, config, output)
    for first in range(0, prepared.prompts, CHUNK):
        if dist.on_main(missing_parts, output, models, first, prepared.prompts):
            measure_chunk(models, prepared, output, first)
    if dist.is_main():
        remove(output / "work")
        if judge:
            judge_models(output, [model.name for model in models], judge)
        for model in models:
            intact(output / "judge" / model.name / "outcomes.jsonl")  # a damaged one is set aside, and has no figures
        print_figures(write_figures(output))
        log(f"figures: {output / 'figures.json'}")
        write_page(output)
    dist.free_memory()  # lm-eval takes what is free
    destroy_process_group()


def write_page(output: Path) -> None:
    write_text(output / "report.html", evaluation_text(output))
    log(f"report: {output / 'report.html'}")


class Prepared(NamedTuple):
    """The models and prompts of an evaluation that may begin."""

    runs: list[Run]  # the run that reads and loads for each model
    readers: list[int]  # the number of each model's reader
    prompts: int  # their number


def prepare(models: Sequence[Model], config: Config, output: Path) -> Prepared:
    """Check everything, encode the prompts, and make the evaluation's folder.

    Raises:
        InputError: a model or a row cannot be used, or the folder has another evaluation.
    """
    configs = [config_of(model, config, number) for number, model in enumerate(models)]
    if dist.is_main():
        keep_settings = check_evaluation(output, settings_of(models, configs, config))
    check_shared(output)
    check_scores(config)
    quiet()
    for model, own in zip(models, configs, strict=True):
        check_weights_exist("model", model.path)
        check_positions(own, load_model_config(own).get_text_config())
    if config.use_vllm:
        check_vllm(config)
    written = write_data(configs, output) if dist.is_main() else None
    if dist.is_main():
        keep_settings()
    init_process_group(config.stall_timeout)
    if dist.is_main():
        note_start(output)
    encoders, readers, count = dist.broadcast_object(written)
    log_incomparable(models, readers)
    rows, metrics_log = Rows(output / "data" / "rows.jsonl"), MetricsLog(output, config)
    runs = [
        Run(own, output, model.path, encoder, NONE, NONE, metrics_log, rows)
        for model, own, encoder in zip(models, configs, encoders, strict=True)
    ]
    return Prepared(runs, readers, count)


def settings_of(models: Sequence[Model], configs: Sequence[Config], config: Config) -> dict[str, Any]:
    """Return what ``evaluation.yaml`` holds: the models, the checksums of their weights, and the configuration."""
    weights = {
        model.name: fingerprint_of(model.path, own.model_revision) for model, own in zip(models, configs, strict=True)
    }
    names = {"models": {model.name: str(model.path) for model in models}, "seeds": seeds_among(models)}
    return names | {"weights": weights} | redacted(dataclasses.asdict(config))


def write_data(configs: Sequence[Config], output: Path) -> tuple[list[Encoder], list[int], int]:
    """Encode the prompts for every model. Return the models' encoders, their readers' numbers, and the prompts' count.

    Models with the same encoder have one reader.
    """
    path = output / "data.json"
    earlier = read_json(path) if intact(path) else {}
    begun = earlier.get("begun") or datetime.datetime.now().isoformat()
    encoders = encoders_of(configs, datetime.datetime.fromisoformat(begun))
    firsts = [next(i for i, other in enumerate(encoders) if other is encoder) for encoder in encoders]
    distinct = sorted(set(firsts))
    readers = [Reader(encoders[number], configs[number], SetCounts(), Hashes()) for number in distinct]
    lock(output)
    remove_temporary(output)
    count = write_prompts(output, configs[0], readers, begun)
    return encoders, [distinct.index(number) for number in firsts], count


def config_of(model: Model, config: Config, number: int) -> Config:
    """Return the configuration by which a model is loaded. The revision is that of the first model."""
    return dataclasses.replace(
        config, model_name_or_path=str(model.path), model_revision="main" if number else config.model_revision
    )


def check_evaluation(output: Path, settings: dict[str, Any]) -> Callable[[], None]:
    """Check that the folder is new, or has the same evaluation; models may be added behind the others.

    Return the function that then writes ``evaluation.yaml``. One that was damaged is written only as it was.

    Raises:
        InputError: it has another one; the message shows the difference.
    """
    path = output / "evaluation.yaml"
    if (output / "config.yaml").exists():
        raise InputError(f"output_dir {output}: found a run, expected a folder of its own for the evaluation")
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    if not intact(path):
        lost = f"{path}: is missing or damaged, and held another configuration or other models than these; put it back"
        return functools.partial(keep_text, path, text, lost)
    old = restored(yaml.safe_load(path.read_text(encoding="utf-8")), settings)
    for name, weights in old["weights"].items():
        if settings["weights"].get(name, weights) != weights:
            raise InputError(
                f"output_dir {output}: the weights of {name} have changed since; expected a new output_dir"
            )
    before, after = [*old["models"]], [*settings["models"]]
    if after[: len(before)] != before:
        raise InputError(
            f"output_dir {output}: its evaluation is of {', '.join(before)}, but found {', '.join(after)}; expected "
            "these models, with others behind them, or a new output_dir"
        )
    keys = ({name: value for name, value in each.items() if name not in OF_MODELS} for each in (old, settings))
    refused, _ = differences(*keys)
    if refused:
        raise InputError(f"output_dir {output}: its evaluation has another configuration ({'; '.join(refused)})")
    return functools.partial(keep_text, path, text)


def log_incomparable(models: Sequence[Model], readers: Sequence[int]) -> None:
    others = [model.name for model, reader in zip(models, readers, strict=True) if reader != readers[0]]
    if others:
        log(
            f"{', '.join(others)}: another tokenizer or chat template than {models[0].name}'s, so that its "
            "likelihoods per token do not compare, and there are no margins and no KL"
        )


# ---------------------------------------------------------------- rows


def parts_of(output: Path, model: Model, first: int, count: int) -> list[Path]:
    """Return the files of a model's rows for the prompts of a chunk."""
    numbers = range(first // PART, -(-min(first + CHUNK, count) // PART))
    return [output / "models" / model.name / f"part-{number:05d}.jsonl" for number in numbers]


def missing_parts(output: Path, models: Sequence[Model], first: int, count: int) -> list[Path]:
    """Return the files of the models' rows for the prompts of a chunk that are not there and intact."""
    return [part for model in models for part in parts_of(output, model, first, count) if not intact(part)]


def measure_chunk(models: Sequence[Model], prepared: Prepared, output: Path, first: int) -> None:
    """Measure every model on a chunk of prompts, and write the parts of its rows that are not there and intact."""
    runs, readers, count = prepared
    work = output / "work" / f"{first:08d}"
    config, number = runs[0].config, first // PART
    how = sampling(config, 0, number)
    subjects = []
    for model, run, reader in zip(models, runs, readers, strict=True):
        examples = load_examples(chunk_path(output / "data", reader, first))
        subjects.append(Subject(run._replace(held_out=examples), model.path, work / model.name))
    for model, subject, reader in zip(models, subjects, readers, strict=True):
        parts = parts_of(output, model, first, count)
        missing = dist.on_main(missing_parts, output, [model], first, count)
        if not missing:
            continue
        reference = subjects[0] if reader == readers[0] else subject
        log(f"{model.name}: prompts {first:,} to {first + len(subject.run.held_out) - 1:,}")
        rows = measure(subject, reference, how, config.num_generations, own=True)
        for part, start in zip(parts, range(0, len(rows), PART), strict=True):
            if dist.is_main() and part in missing:
                keep_jsonl(part, (without_prompt(row) for row in rows[start : start + PART]))
    dist.barrier()
    if dist.is_main():
        remove(work)
    dist.barrier()


def without_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in IN_PROMPTS}


# ---------------------------------------------------------------- the command


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the command's own options, and the keys that are given."""
    parser = make_parser(
        "irlfast evaluate",
        usage="%(prog)s MODEL [MODEL ...] --dataset FILE [key=value | --key value]...",
        description="Compare models on prompts; the first is the baseline. Keys, with the [defaults] of training:",
        listed=LISTED,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder, a hub name, or a run: all its policies")
    parser.add_argument("--dataset", dest="dataset_name", metavar="FILE", help="the prompts: the same as dataset_name")
    add_judge_options(parser)
    add_leaderboard_options(parser)
    return parse_arguments(parser, arguments)


def command() -> None:
    options, keys = read_arguments(sys.argv[1:])
    models, judge = models_of(options.models), judge_settings(options)
    config = configure(models, keys, options.leaderboard)
    with writing_to(config.output_dir, "output_dir"):
        watchdog.start(home_path(config.output_dir), config.stall_timeout)
        if config.dataset_name:
            evaluate(models, config, judge)
        if options.leaderboard and dist.is_main():
            show_leaderboard({model.name: model.path for model in models}, config, options)
            if config.dataset_name:
                write_page(home_path(config.output_dir))  # anew, with the leaderboard


def configure(models: Sequence[Model], keys: dict[str, Any], leaderboard: bool) -> Config:
    """Fill in the keys that are not given: those of a run among the models, then the defaults.

    Raises:
        InputError: a key is wrong, or there is neither a dataset nor a leaderboard.
    """
    own = {"output_dir": "runs/evaluation", "max_eval_samples": None} | keys_of_runs(models)
    if not keys.get("dataset_name"):
        if leaderboard:
            return read_config(own | keys)
        raise InputError("--dataset: found nothing, expected a file of prompts or a hub dataset")
    given = {"model_name_or_path": str(models[0].path), "eval_dataset_name": keys["dataset_name"]}
    return make_config(own | keys | given)


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
