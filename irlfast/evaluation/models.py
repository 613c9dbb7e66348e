"""The models of an evaluation: folders, hub names, and the policies of runs; each has a name and an encoder."""

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from irlfast.common.artefacts import checksums
from irlfast.common.files import InputError, find_path, is_local
from irlfast.common.messages import first_sentence, log
from irlfast.config import Config
from irlfast.data.encoding import Encoder, make_encoder
from irlfast.models.configs import stop_tokens
from irlfast.models.lora import base_and_adapter, revision_of_base
from irlfast.models.tokenizers import load_tokenizer
from irlfast.runs.output import MAY_CHANGE

PHASES = ("initial", "sft-nll", "sft", "stage-*")  # of a run, in order
# The keys of a run that say how its policies read and answer prompts. An evaluation of its policies takes them.
OF_A_RUN = (
    "chat_template",
    "chat_template_kwargs",
    "prompt_template",
    "system_prompt",
    "split_special_tokens",
    "max_length",
    "max_prompt_length",
    "max_new_tokens",
    "max_thought_tokens",
    "thought_mark",
    "dtype",
    "trust_remote_code",
)


class Model(NamedTuple):
    """A model of an evaluation."""

    name: str  # as tables show it, and as the folder of its rows is called
    path: Path | str  # a folder, or a name on the hub
    run: Path | None  # the run that the model is a policy of


def models_of(names: Sequence[str]) -> list[Model]:
    """Return the models that the command line names, in order; a run stands for all its policies.

    Raises:
        InputError: a folder is missing or is no model, or two models have one name.
    """
    models: list[Model] = []
    for name in names:
        models += models_at(name)
    taken: dict[str, Model] = {}
    for model in models:
        if model.name in taken:
            raise InputError(
                f"model {model.path}: found the name {model.name!r} twice (also {taken[model.name].path}); expected "
                "folders of different names"
            )
        taken[model.name] = model
    return models


def models_at(name: str) -> list[Model]:
    """Return the model of this name, or the policies of the run in this folder."""
    folder = find_path(name)
    if folder is None:
        if is_local(name):
            raise InputError(f"model {name}: no such folder")
        return [Model(name, name, None)]
    folder = folder.resolve()
    if is_run(folder):
        return policies_of(folder)
    if not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        raise InputError(f"model {name}: found neither config.json nor adapter_config.json, expected a model or a run")
    run = next((parent for parent in folder.parents if is_run(parent)), None)
    if run is None:
        return [Model(folder.name, folder, None)]
    inner = folder.relative_to(run)
    return [Model(f"{run.name}/{inner.parent if inner.name == 'policy' else inner}", folder, run)]


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() and (folder / "data").is_dir() and not (folder / "config.json").exists()


def policies_of(run: Path) -> list[Model]:
    """Return the policies that a run has made so far, in order. The random weights of a new model are none.

    Raises:
        InputError: the run has no policy yet.
    """
    given = keys_of(run).get("model_name_or_path")
    policies = [path for phase in PHASES for path in sorted(run.glob(f"{phase}/policy"))]
    if not given and not (run / "initial" / "eval.json").exists():  # a new model, before SFT
        policies = [path for path in policies if path.parent.name != "initial"]
    models = [Model(f"{run.name}/{path.parent.name}", path, run) for path in policies]
    deleted = [path.parent.name for path in sorted(run.glob("stage-*/DONE")) if not (path.parent / "policy").exists()]
    if deleted:
        log(f"run {run}: the policies of {', '.join(deleted)} were deleted (save_total_limit)")
    if given and not (run / "initial" / "policy").exists():
        models.insert(0, Model(f"{run.name}/initial", find_path(given) or given, run))
    if not models:
        raise InputError(f"run {run}: found no policy yet, expected a phase that is done")
    return models


def keys_of(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def keys_of_runs(models: Sequence[Model]) -> dict[str, Any]:
    """Return the keys of the first run among the models that say how its policies read and answer prompts."""
    run = next((model.run for model in models if model.run), None)
    if run is None:
        return {}
    given = keys_of(run)
    own = {name: given[name] for name in OF_A_RUN if name in given}
    return own | ({"method": "reasoning"} if given["method"] == "reasoning" else {})


def seeds_among(models: Sequence[Model]) -> dict[str, list[str]]:
    """Return the groups of models that are the same policy of runs which differ in their seed alone.

    A group's models are in the order of their seeds, and its name says which policy of which runs it has. Keys that
    change no result, such as where logs go, may differ, too.
    """
    groups: dict[tuple[str, str], dict[int, Model]] = {}
    for model in models:
        if model.run:
            keys = keys_of(model.run)
            same = {name: value for name, value in keys.items() if name != "seed" and name not in MAY_CHANGE}
            policy = model.name.removeprefix(f"{model.run.name}/")
            groups.setdefault((policy, json.dumps(same, sort_keys=True, default=str)), {})[keys["seed"]] = model
    named: dict[str, list[str]] = {}
    for (policy, _), group in groups.items():
        if len(group) > 1:
            own = [group[seed] for seed in sorted(group)]
            named[f"{policy} of {', '.join(model.run.name for model in own if model.run)}"] = [x.name for x in own]
    return named


# ---------------------------------------------------------------- encoders


def encoders_of(configs: Sequence[Config], begun: datetime.datetime) -> list[Encoder]:
    """Return the encoder of each model. Models that read the same token ids have one encoder, the same object.

    A model has its own tokenizer and chat template. A model without a template takes that of the first model with one.
    """
    tokenizers = [load_tokenizer(config, []) for config in configs]
    template = next((each.chat_template for each in tokenizers if each.chat_template), None)
    encoders: list[Encoder] = []
    for config, tokenizer in zip(configs, tokenizers, strict=True):
        tokenizer.chat_template = tokenizer.chat_template or template
        encoder = make_encoder(tokenizer, config, begun, stop_tokens(config))
        encoders.append(next((each for each in encoders if reads_the_same(each, encoder)), encoder))
    return encoders


def reads_the_same(one: Encoder, other: Encoder) -> bool:
    """Return whether two encoders write a conversation as the same token ids, up to the same end."""
    first, second = one.tokenizer, other.tokenizer
    same = first.get_vocab() == second.get_vocab() and first.chat_template == second.chat_template
    return same and one[2:] == other[2:]


# ---------------------------------------------------------------- weights


def fingerprint_of(model: Path | str, revision: str = "main") -> str:
    """Return a text that changes with a model's files: their SHA-256, or the commit of a model on the hub.

    An adapter names the revision of its base itself.

    Raises:
        InputError: the model is neither here nor on the hub.
    """
    from transformers.utils import cached_file

    base, adapter = base_and_adapter(model)
    parts = [folder_hash(adapter)] if adapter else []
    if folder := find_path(base):
        return ", ".join([*parts, folder_hash(folder)])
    try:
        config = cached_file(base, "config.json", revision=revision_of_base(adapter) if adapter else revision)
    except OSError as error:
        raise InputError(f"model {base}: found neither here nor on the hub ({first_sentence(error)})") from error
    return ", ".join([*parts, f"commit {Path(str(config)).parent.name}"])


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 of a folder's names and contents, without its README."""
    sums = {name: each for name, each in checksums(folder).items() if Path(name).name != "README.md"}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
