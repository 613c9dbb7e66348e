"""The native modules of ``csrc/``: each None where it was not built, and PyTorch does its work."""

from typing import Any

cpu: Any
try:
    from irlfast import _cpu as cpu  # type: ignore[attr-defined, no-redef]
except ImportError:
    cpu = None
