"""Types of the values of keys: numbers within bounds, names of losses, sources of rows."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from irlfast.common.secrets import redacted

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Order = Annotated[float, Field(ge=0, le=80)]

MethodName = Literal[
    "irft",
    "spin",
    "t_spin",
    "dpo",
    "rft",
    "afd",
    "gad",
    "r_airl",
    "sdft",
    "reasoning",
    "reward",
    "sft",
]

PairLossName = Literal[
    "sigmoid",
    "hinge",
    "linear",
    "cdpo",
    "robust",
    "exo_pair",
    "discopop",
    "ipo",
    "sigmoid_norm",
    "nca_pair",
    "bco_pair",
    "space",
    "iris",
    "kto_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
]

Columns = dict[Literal["prompt", "answer", "rejected", "messages", "text", "system", "tools", "label"], str]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Dataset:
    """One of several sources of ``dataset_name``. The keys of the run stand in for fields that are left out."""

    name: str
    weight: Positive | None = None
    split: str | None = None
    config: str | None = None
    columns: Columns | None = None


Datasets = str | list[str | Dataset]

SHOWN = 200  # characters of a value in a message

DATASETS = ("dataset_name", "eval_dataset_name", "prompt_dataset_name")  # the keys that have such values
FILES = ("config_name", "chat_template", "deepspeed")  # keys that may name a file
MODELS = ("model_name_or_path", "tokenizer_name_or_path", "reward_backbone")  # keys that may name a folder
SEVERAL_MODELS = ("reward_model_name_or_path", "implicit_reward_policy", "implicit_reward_reference")
FUNCTIONS = ("reward_function",)  # keys that may name a file, ":" and a function in it


def key(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


def is_set(config: Any, name: str) -> bool:
    """Return whether a key has another value than its default."""
    return bool(getattr(config, name) != type(config).__pydantic_fields__[name].default)


def listed(value: Any) -> list[Any]:
    """Return the values of a key that takes one value or a list."""
    return value if isinstance(value, list) else [value]


def shown(value: Any) -> str:
    """Return a value as Python writes it, and of a long one the beginning."""
    text = repr(redacted(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"
