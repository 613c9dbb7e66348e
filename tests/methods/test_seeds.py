"""The random numbers of a run: no two of its phases have the same."""

import random

import numpy as np
import pytest

from irlfast.config import make_config
from irlfast.methods import METHODS


@pytest.mark.parametrize("method", ["rft", "sdft", "gad", "irft", "reasoning"])
def test_no_two_phases_of_a_run_take_their_prompt_groups_in_the_same_order(method):
    draw = random.Random(method)
    stages, rounds = draw.randint(2, 4), draw.randint(2, 60)
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "method": method, "seed": draw.randrange(1000)}
    keys |= {"stages": stages, "align_rounds": rounds, "sft_steps": 1, "sft_nll_steps": 1, "sft_loss_type": "dft"}
    if method == "sdft":
        keys |= {"prompts_per_stage": "split"}
    phases = METHODS[method].phases(make_config(keys), 32 * stages * rounds)
    orders = [tuple(np.concatenate(phase.plan().steps)) for phase in phases]
    assert len(orders) >= stages + 2 and len({*orders}) == len(orders)
