"""Kernels run on a GPU where there is one.

With ``TRITON_INTERPRET=1`` they run on the CPU: Triton's by its interpreter, CUDA C++ by :mod:`tests.kernels.emulated`.
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


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    device = "cpu" if INTERPRETED else "cuda"
    if request.param == "cuda" and getattr(native.cuda, "device", None) != device:
        pytest.skip("irlfast._cuda is not built here")
    return request.param
