"""The process group of a run."""

import os
import subprocess
import sys

from tests.helpers.runs import ROOT

PRODUCT = """
import torch
from irlfast.engine.process_group import init_process_group
init_process_group()
print((torch.full((1_000_000,), 1e-30) * 1e-10).count_nonzero().item())
"""


def test_products_too_small_for_a_cpu_to_compute_fast_are_0_in_all_threads():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", PRODUCT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"
