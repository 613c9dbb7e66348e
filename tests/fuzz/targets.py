"""The targets of the fuzz: each is a module with a strategy ``INPUTS`` and a function ``check`` of what it draws.

``check`` returns, or raises; whatever it raises is a fault. ``EXAMPLES`` has the reduced inputs of faults that were
found. The same strategy serves Hypothesis, which draws from it, and atheris, which turns bytes into choices of it.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.guards import guarded

TARGETS = (
    "configuration",
    "data_files",
    "rows",
    "templates",
    "packer",
    "model_folders",
    "deepspeed_file",
    "pages",
)
CORPUS = Path(__file__).parent / "corpus"
DRAWN_ONLY = {
    "database": None,
    "deadline": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


def module_of(target: str) -> ModuleType:
    return importlib.import_module(f"tests.fuzz.{target}")


def one_input(target: str) -> Callable[[bytes], bytes | None]:
    """Return a function that turns bytes into an input and checks it; it returns None where the bytes are too few."""
    module = module_of(target)
    return given(module.INPUTS)(settings(**DRAWN_ONLY)(guarded(module.check))).hypothesis.fuzz_one_input


def drawn_inputs(check: Callable[[Any], None], inputs: Any, count: int, **more: Any) -> None:
    """Let Hypothesis draw ``count`` inputs for ``check``."""
    given(inputs)(settings(max_examples=count, **(DRAWN_ONLY | more))(check))()
