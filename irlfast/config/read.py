"""Read the configuration from flat YAML and the command line, and check it before anything heavy is imported.

argparse reads the command line and prints the help. :mod:`irlfast.config.schema` has the keys.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from irlfast.common import launch
from irlfast.common.files import InputError, home_path
from irlfast.common.secrets import redacted
from irlfast.common.yaml_text import parse_yaml
from irlfast.config.checks import IN_PLACE_OF, check
from irlfast.config.deepspeed import merged_settings
from irlfast.config.methods import METHOD_FACTS, SFT_TEACHERS, MethodFacts
from irlfast.config.recipes import recipe
from irlfast.config.schema import FIELDS, Config
from irlfast.config.types import DATASETS, shown

LISTS = (
    "reward_model_name_or_path",
    "implicit_reward_policy",
    "implicit_reward_reference",
    "reward_function",
    "scorer",
)
ACCUMULATION = "gradient_accumulation_steps"
# Earlier spellings of keys, or of keys with a value, and what to write now.
RENAMED = {
    "bf16": "dtype: bfloat16",
    "sampler": "use_vllm: true",
    "sft_per_device_train_batch_size": "sft_global_batch_size, which is per step of all processes",
    "reward_loss: sigmoid": "reward_loss: bradley_terry",
    "reward_loss: bound": "reward_loss: airl, gail, fairl or alpha",
    "divergence: reverse_kl": "divergence: airl",
    "divergence: js": "divergence: gail",
    "divergence: forward_kl": "divergence: fairl",
}


def load_config(arguments: list[str], prog: str = "irlfast train") -> tuple[Config, bool]:
    """Read ``[FILE.yaml | RECIPE] [key=value | --key value | --key=value | --dry_run]...``.

    Returns:
        The configuration, and whether ``--dry_run`` is given.

    Raises:
        InputError: a key is wrong; the message names it, what was found and what was expected.
    """
    parser = make_parser(
        prog,
        usage="%(prog)s [CONFIG.yaml | RECIPE] [key=value | --key value]... [--dry_run]",
        description="Align a language model from demonstrations. Keys, with their [defaults]:",
    )
    parser.add_argument("config", nargs="?", help="A YAML file of keys, or a name that `irlfast recipes` lists.")
    parser.add_argument("--dry_run", action="store_true", help="Show what the run would do, with estimates, then stop.")
    parsed, typed = parse_arguments(parser, arguments)
    given = read_yaml(config_file(parsed.config)) if parsed.config else {}
    return make_config(given | typed), parsed.dry_run


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return what a command's own arguments are, and the keys that are given.

    Raises:
        InputError: there is no such key; the message has the nearest one.
    """
    tokens = [re.sub(r"^(--)?([A-Za-z][\w-]*)(=|$)", dashed, token) for token in arguments]
    parsed, unknown = parser.parse_known_intermixed_args(tokens)
    unexpected = [token for token in unknown if token.startswith("--")] or unknown
    if unexpected:
        raise InputError(unknown_key(unexpected[0].lstrip("-").split("=")[0], "on the command line"))
    keys = {name: literal(name, text) for name, text in vars(parsed).items() if name in FIELDS and text is not None}
    return parsed, keys


def dashed(match: re.Match) -> str:
    """Spell ``key=value`` and ``--some-key`` as argparse takes them: ``--key=value`` and ``--some_key``."""
    option, name, equals = match.group(1), match.group(2), match.group(3)
    return f"--{name.replace('-', '_')}{equals}" if option or equals else match.group(0)


def make_parser(prog: str, usage: str, description: str, listed: Collection[str] = FIELDS) -> argparse.ArgumentParser:
    """Make a parser that has an option for every key; its help lists those in ``listed``."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    descriptions = Config.__pydantic_fields__  # type: ignore[attr-defined]
    for name in FIELDS:
        field = descriptions[name]
        text = f"{field.description} [{'none' if field.default is None else repr(field.default)}]"
        boolean = {"nargs": "?", "const": "true"} if isinstance(field.default, bool) else {}
        line = text.replace("%", "%%") if name in listed else argparse.SUPPRESS
        parser.add_argument(f"--{name}", metavar="VALUE", help=line, **boolean)  # type: ignore[arg-type]
    return parser


def literal(name: str, text: str) -> Any:
    """Read a value of the command line: lists, mappings and null as YAML, others as text, which pydantic converts."""
    structured = text.startswith("[") or text == "null" or (text.startswith("{") and not name.endswith("template"))
    try:
        return parse_yaml(text) if structured else text
    except ValueError as error:
        raise InputError(f"{name}: found {shown(text)}, which is not YAML ({error})") from error


def config_file(name: str) -> Path:
    """Return the file of this name, else that of the recipe of this name."""
    path = home_path(name)
    return path if os.path.isfile(path) or path.suffix in (".yaml", ".yml") or len(path.parts) > 1 else recipe(name)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        given = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"config file {path}: found {type(given).__name__}, expected lines of 'key: value'")
    for name in given:
        if not isinstance(name, str):
            raise InputError(f"config file {path}: found the key {shown(name)}, expected the name of a key")
    return given


def make_config(given: dict[str, Any]) -> Config:
    """Check all keys and values, alone and together, and fill in the defaults that follow from other keys.

    Raises:
        InputError: a key is wrong; the message names it, what was found and what was expected.
    """
    config = read_config(given)
    check(config)
    clipping = merged_settings(config)["gradient_clipping"]  # of the file that deepspeed names, if it has one
    return dataclasses.replace(config, max_grad_norm=clipping)


def read_config(given: dict[str, Any]) -> Config:
    """Check each key and value alone, and fill in the defaults that follow from other keys.

    Raises:
        InputError: as of :func:`make_config`.
    """
    given = dict(given)
    for name, value in given.items():
        if f"{name}: {value}" in RENAMED:
            raise InputError(f"{name}: found the earlier spelling {value!r}, expected {RENAMED[f'{name}: {value}']}")
    for name in LISTS:
        if isinstance(given.get(name), str):
            given[name] = [given[name]]
    if isinstance(given.get("report_to"), str):
        given["report_to"] = [] if given["report_to"] == "none" else [given["report_to"]]
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise InputError(unknown_key(unknown[0], "in the configuration"))
    check_batch_size(given)
    try:
        return resolved(Config(**(preset(given) | given)))
    except ValidationError as error:
        raise InputError(describe(error, given)) from error


def check_batch_size(given: dict[str, Any]) -> None:
    """Check that the prompts per optimiser step are given in one spelling.

    Raises:
        InputError: they are given in two, or TRL's spelling is not whole.
    """
    whole, device, times = map(given.get, ("global_batch_size", "per_device_train_batch_size", ACCUMULATION))
    if whole is not None and (device is not None or times is not None):
        name, value = ("per_device_train_batch_size", device) if device is not None else (ACCUMULATION, times)
        raise InputError(
            f"global_batch_size and {name}: found {shown(whole)} and {shown(value)}, expected one of the two spellings "
            "(max_tokens_per_batch is what bounds the memory)"
        )
    if times is not None and device is None:
        raise InputError(
            f"{ACCUMULATION}: found {shown(times)} without per_device_train_batch_size; expected both, or "
            "global_batch_size in their place"
        )


def in_all_processes(config: Config) -> Config:
    """Turn TRL's spelling of ``global_batch_size`` into the key itself, and say so."""
    device, times = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if device is None:
        return config
    processes = launch.processes(config.num_processes)
    whole = device * (times or 1) * processes
    say(
        f"global_batch_size: per_device_train_batch_size {device} * {ACCUMULATION} {times or 1} * {processes} "
        f"process{'es' * (processes > 1)} = {whole}"
    )
    return dataclasses.replace(
        config, global_batch_size=whole, per_device_train_batch_size=None, gradient_accumulation_steps=None
    )


def say(line: str) -> None:
    """Print what becomes of a key, once: the processes that a command starts read the same keys again."""
    if not launch.SAID:
        from irlfast.common.messages import log  # which imports torch

        log(line)


def resolved(config: Config) -> Config:
    """Fill in the defaults that follow from other keys, and round ``save_steps`` up."""
    config = in_all_processes(config)
    own = config.reward_loss if config.reward_loss in ("airl", "gail", "fairl", "alpha") else "airl"
    # A checkpoint is written at a logged step, so that a resumed run logs and stops where an unbroken one does.
    save_steps = math.ceil(config.save_steps / config.logging_steps) * config.logging_steps
    if save_steps != config.save_steps:
        say(f"save_steps: {config.save_steps} is rounded up to {save_steps}, a multiple of logging_steps")
    return dataclasses.replace(config, divergence=config.divergence or own, save_steps=save_steps)


def preset(given: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the method and of its SFT loss, without the epochs that given steps replace."""
    facts = METHOD_FACTS.get(str(given.get("method")), MethodFacts())
    own = facts.preset | SFT_TEACHERS.get(str(given.get("sft_loss_type")), {})
    return {name: value for name, value in own.items() if given.get(IN_PLACE_OF.get(name, "")) is None}


def unknown_key(name: str, where: str) -> str:
    if name in RENAMED:
        return f"{name}: found an earlier spelling {where}, expected {RENAMED[name]}"
    nearest = difflib.get_close_matches(name, FIELDS, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; --help lists all keys"
    return f"unknown key {name!r} {where}{hint}"


def describe(error: ValidationError, given: dict[str, Any]) -> str:
    """Say in one line which keys are wrong, what was found and what was expected."""
    expected: dict[str, list[str]] = {}
    inputs = {}
    for problem in error.errors():
        name = str(problem["loc"][0])
        wanted = problem["msg"].replace("Input should be ", "").split(", unable")[0]
        expected.setdefault(name, []).append(wanted)
        inputs[name] = problem["input"]
    for name in expected.keys() & {*DATASETS}:  # pydantic would list a dozen alternatives
        expected[name] = ["a name, or a list of names or of {name, weight, split, config, columns}, weights above 0"]
        inputs[name] = given[name]
    return "; ".join(
        f"{name}: found {shown(inputs[name])}, expected {' or '.join(expected[name])}" for name in expected
    )


def dump(config: Config) -> str:
    """Write the configuration as YAML, with every default filled in and secrets redacted."""
    return yaml.safe_dump(redacted(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """List the keys whose values differ, as ``key: old -> new``."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names)
