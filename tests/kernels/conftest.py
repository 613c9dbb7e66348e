"""Kernels run on a GPU where there is one.

With ``TRITON_INTERPRET=1`` they run on the CPU: Triton's by its interpreter, CUDA C++ by :mod:`tests.kernels.emulated`.
A run on a GPU writes what passed and failed to ``benchmarks/results/DATE-gpu-tests.json``.
"""

import os
import shutil

import pytest
import torch

from irlfast import native

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch 2.11's products refuse to be deterministic
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests below are for the CPU
    from tests.kernels.interpreter import repair_bf16

    repair_bf16()
    if shutil.which("g++"):
        from tests.kernels import emulated

        native.cuda = emulated.module()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter, config):
    outcomes = {name: terminalreporter.stats.get(name, []) for name in ("passed", "skipped", "failed", "error")}
    if hasattr(config, "workerinput") or not torch.cuda.is_available() or not any(outcomes.values()):
        return
    from benchmarks.conftest import write_result

    counts = {name: len(reports) for name, reports in outcomes.items()}
    failures = [report.nodeid for report in outcomes["failed"] + outcomes["error"]]
    terminalreporter.write_line(f"written to {write_result('gpu-tests', {'outcomes': counts, 'failures': failures})}")


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    device = "cpu" if INTERPRETED else "cuda"
    if request.param == "cuda" and getattr(native.cuda, "device", None) != device:
        pytest.skip("irlfast._cuda is not built here")
    return request.param
