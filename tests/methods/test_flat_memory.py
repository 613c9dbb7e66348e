"""The memory of a stage grows by a few dozen bytes per prompt: nothing but flat arrays grows with the prompts."""

import random
import tracemalloc
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from irlfast.common import artefacts
from irlfast.config import make_config
from irlfast.data import store
from irlfast.data.packing import Layout
from irlfast.data.store import make_examples
from irlfast.engine.alarms import log_doubts
from irlfast.engine.memory import phase_limit
from irlfast.engine.step import prepare_step
from irlfast.methods import credit, irft, rft
from irlfast.methods.stages import stage_request
from irlfast.runs.run import Run
from irlfast.sampling.generation import keep_answers
from irlfast.sampling.shards import Drawn, Request, parts_of
from tests.data.test_packing import VOCABULARY, model_of
from tests.helpers.runs import SERVER
from tests.helpers.tiers import full

FEW, MANY = 100, 1000  # prompts
TOKENIZER = types.SimpleNamespace(
    batch_decode=lambda answers, **_: [str(answer) for answer in answers], decode=lambda ids, **_: str(ids)
)


def run_of(folder: Path, count: int, **keys) -> Run:
    """A run on ``count`` prompts of three tokens with answers of four."""
    model_of("Llama").save_pretrained(folder / "model")
    keys |= {"dataset_name": __file__, "model_name_or_path": str(folder / "model"), "output_dir": str(folder)}
    encoder = types.SimpleNamespace(ends=(2,), tokenizer=TOKENIZER)
    lengths = np.tile(np.array([3, 4, 0, 0], np.int32), count)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 7 * count, dtype=np.int32)
    train = make_examples(tokens.data, lengths, np.arange(count, dtype=np.int32))
    config = make_config({"dtype": "float32", "sft_epochs": None, "stages": 1, "inner_steps": 1, **keys})
    log = types.SimpleNamespace(known={})
    return Run(config, folder, str(folder / "model"), encoder, train, train[:0], log, None)


def keep_samples(request: Request) -> None:
    """Keep answers of four tokens to a request's prompts, as a sampler would."""
    draw = random.Random(0)
    for part in parts_of(request):
        count = len(part.chosen) * request.n
        keep_answers(part, [Drawn(draw.choices(range(3, VOCABULARY), k=4), [-draw.random()] * 4) for _ in range(count)])


def begin_to_train(run, folder, policy, groups, loss, plan):
    """Do what grows with the groups in a phase, in place of training."""
    log_doubts(folder.name, plan, groups)
    limit = phase_limit(run.config, groups, Layout(), plan.steps[0].size, folder / "checkpoint")
    prepare_step(plan.steps[0], groups, Layout(), limit.tokens)
    return folder / "policy"


def peak_of_irft(folder: Path, count: int) -> int:
    """The peak of the memory that Python and NumPy hold in a stage of IRFT whose answers are there, in bytes."""
    run = run_of(folder, count)
    keep_samples(stage_request(run, 0))
    tracemalloc.start()
    irft.irft_stage(run, 0, run.initial, run.initial)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def peak_of_alignment(folder: Path, count: int) -> int:
    """The same of a round of RFT with two answers to each prompt, by a reward that is there."""
    run = run_of(folder, count, method="afd", reward_data="none", num_generations=2, implicit_reward_policy=["initial"])
    examples = rft.asked_in_round(run, 0, 0)
    keep_samples(rft.rollout_request(run, 0, 0, examples))
    tracemalloc.start()
    rft.align(run, 0, 0, run.initial, run.initial, [], examples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def bytes_per_prompt(peak, folder: Path) -> float:
    """The bytes by which each prompt raises the peak of this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(irft, "fit", begin_to_train)
        patched.setattr(rft, "fit", begin_to_train)
        patched.setattr(store, "CHUNK", 32)
        patched.setattr(credit, "BLOCK", 32)
        patched.setattr(artefacts, "checksum", lambda file: [file.stat().st_size, ""])  # its buffer would hide much
        peak(folder / "imports", 10)
        few, many = peak(folder / "few", FEW), peak(folder / "many", MANY)
    return (many - few) / (MANY - FEW)


@pytest.mark.parametrize(("peak", "most"), [(peak_of_irft, 300), pytest.param(peak_of_alignment, 500, marks=full)])
def test_a_stage_takes_few_bytes_per_prompt(tmp_path, peak, most):
    """About 100 of them, and 150 with two answers, are token ids and log-probabilities; objects took 1,800 and more."""
    with ProcessPoolExecutor(1, mp_context=SERVER) as fresh:  # what other tests left would be measured, too
        assert fresh.submit(bytes_per_prompt, peak, tmp_path).result(timeout=300) < most
