"""The process group of a run."""

import os
import subprocess
import sys

from tests.helpers.runs import ROOT


def test_products_too_small_for_a_cpu_to_compute_fast_are_0_in_all_threads():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "tests.helpers.tiny_product"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"
