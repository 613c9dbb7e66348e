"""Types of the values of keys: numbers within bounds, names of losses, sources of rows."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

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


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Dataset:
    """One of several sources of ``dataset_name``. The keys of the run stand in for fields that are left out."""

    name: str
    weight: Positive | None = None
    split: str | None = None
    config: str | None = None
    columns: Columns | None = None


Datasets = str | list[str | Dataset]

DATASETS = ("dataset_name", "eval_dataset_name", "prompt_dataset_name")  # the keys that have such values


def listed(value: Any) -> list[Any]:
    """Return the values of a key that takes one value or a list."""
    return value if isinstance(value, list) else [value]
