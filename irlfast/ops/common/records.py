"""Records as arguments of torch's custom operations, which take no records: flattened there, and rebuilt inside.

The order of the arguments is that of a record's own fields, in the schema, at the call and inside.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any, get_type_hints

import torch
from torch import Tensor

from irlfast.ops.common.types import PairFunction

SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
    tuple[float, ...]: "float[]",
    tuple[str | PairFunction, ...]: "str[]",  # functions do not pass through a schema
}


def schema_of(record: type, prefix: str = "", optional: bool = False) -> str:
    """The fields of a NamedTuple in a schema of torch, such as ``"Tensor hidden, Tensor weight, Tensor? bias"``.

    With ``optional``, every field may be None.
    """
    fields = ((name, SCHEMA_TYPES[kind]) for name, kind in get_type_hints(record).items())
    return ", ".join(f"{kind.rstrip('?') + '?' if optional else kind} {prefix}{name}" for name, kind in fields)


def rebuild(arguments: Iterable[Any], *records: Any) -> list[Any]:
    """The ``records``, each from the next of the arguments by the number of its fields; then the arguments left."""
    left = iter(arguments)
    return [*(record(*islice(left, len(record._fields))) for record in records), *left]
