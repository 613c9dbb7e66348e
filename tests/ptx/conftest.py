"""Triton's launches run as compiled PTX on CPU tensors."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from irlfast.kernels import linear
from irlfast.ops.common import checks
from tests.ptx.driver import ARCHITECTURES, Session, gpu

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]  # then Triton compiles nothing


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``on_gpu(architecture)`` is :func:`tests.ptx.driver.gpu`; the operations then choose as on such a GPU."""

    def entered(architecture: int, **options: Any) -> Any:
        monkeypatch.setattr(checks, "INTERPRETED", True)
        monkeypatch.setattr(linear, "capability", lambda _: divmod(architecture, 10))
        return gpu(architecture, **options)

    return entered


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def session(request: pytest.FixtureRequest, on_gpu: Any) -> Iterator[Session]:
    """The record of the kernels that Triton compiles and launches during a test, on each architecture."""
    with on_gpu(request.param) as session:
        yield session
