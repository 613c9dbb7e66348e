"""Started by test_saving.py: checkpoints that a thread writes while a tiny model is trained.

    python -m tests.helpers.held_saves FOLDER CASE...

A case is a ZeRO stage and a dtype, with a space between. After two steps, one checkpoint is written while training
waits. A second one is begun, and its first file is held back until two more steps are taken. Prints JSON: for every
case how many files both have, whether they are the same, whether the second was in work all the time, whether it had
no name until the last process wrote its part, and whether the weights have moved since.
"""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from irlfast.common import dist, ranks
from irlfast.common.artefacts import intact
from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine import state
from irlfast.engine.checkpoint import save_checkpoint
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.memory import TokenLimit
from irlfast.engine.meters import Stopwatch
from irlfast.engine.plan import Plan
from irlfast.engine.saving import check, saving_beside
from irlfast.engine.step import prepare_steps, train_step
from irlfast.losses.sft import sft_loss
from tests.helpers.results import print_results
from tests.helpers.small_llama import start_with_llama

SHAPE = {"hidden_size": 16, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPS = [PromptGroup([1, word], ([word, 4, 5, 2], [6, word, 2])) for word in range(3, 35)]
PROGRESS = {"step": 2, "bad_steps": 0, "grad_norm": 1.0, "back_to": 2}
GO = threading.Event()
save_tensors = state.save_tensors


def held(*given: Any) -> None:
    """Write a file once this process is told to."""
    assert GO.wait(60)
    save_tensors(*given)


def trained(folder: Path, case: str) -> dict[str, Any]:
    stage, dtype = case.split()
    given = {"dataset_name": ".", "model_name_or_path": str(folder), "zero_stage": int(stage), "dtype": dtype}
    config = make_config(given)
    plan = Plan(0, [np.arange(8) + 8 * step for step in range(4)], 1e-2, "adamw_torch")
    engine = make_engine(folder / "model", sft_loss, plan, config, GROUPS)
    steps = prepare_steps(plan.steps, GROUPS, engine.module.prepared.layout, TokenLimit(64, auto=False))
    sums = [train_step(engine, next(steps), 1.0, Stopwatch()).metrics for _ in range(2)][-1]
    places = [folder / case.replace(" ", "-") / name for name in ("waited", "beside")]
    GO.set()
    save_checkpoint(engine, places[0], PROGRESS, sums, plan)
    GO.clear()
    before = state_bytes(engine)
    with saving_beside("sft", wanted=True) as saving:
        save_checkpoint(engine, places[1], PROGRESS, sums, plan, saving)
        assert saving.written
        in_work = []
        for prepared in steps:
            train_step(engine, prepared, 1.0, Stopwatch())
            check(saving)
            in_work.append(not saving.written.done())
        if dist.world_size() > 1 and dist.is_main():
            GO.set()
            while not (places[1] / f"step-2.tmp/sums-{dist.rank()}.safetensors").exists():
                time.sleep(0.01)
            time.sleep(0.2)
        ranks.meet()
        unnamed = not (places[1] / "step-2").exists()
        ranks.meet()
        GO.set()
    moved = state_bytes(engine) != before
    engine.destroy()
    files = [{each.name: each.read_bytes() for each in place.glob("step-2/*")} for place in places]
    same = files[0] == files[1] and dist.on_main(lambda: all(intact(place / "step-2") for place in places))
    return {
        "files": len(files[1]),
        "same": same,
        "in work": all(dist.all_gather_object(all(in_work))),
        "unnamed": all(dist.all_gather_object(unnamed)),
        "moved": moved,
    }


def state_bytes(engine: Any) -> list[bytes]:
    return [values.float().numpy().tobytes() for _, values in state.held_values(engine)]


def main() -> None:
    state.save_tensors = held
    folder = Path(sys.argv[1])
    start_with_llama(folder, vocab_size=100, **SHAPE)
    print_results({case: trained(folder, case) for case in sys.argv[2:]})


if __name__ == "__main__":
    main()
