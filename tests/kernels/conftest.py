"""Kernels run here on a GPU where there is one, else under Triton's interpreter (``TRITON_INTERPRET=1``)."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.kernels.interpreter import repair_bf16

    repair_bf16()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
