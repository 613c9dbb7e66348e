"""Started by test_zero.py: FusedRMSprop through DeepSpeed's universal checkpoints, from two processes to one.

``save FOLDER`` trains, writes a checkpoint of every case half-way, and prints the last parameters as JSON.
``load FOLDER`` continues from the converted checkpoints, and prints the same.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from irlfast.common import dist
from irlfast.config import make_config
from irlfast.engine.deepspeed_engine import deepspeed_settings
from irlfast.engine.process_group import init_process_group
from irlfast.optim import FusedRMSprop
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results
from tests.helpers.zero_steps import batches, network

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {"weight_decay": 0.1}),
    "2-momentum": (2, {"momentum": 0.9}),
    "3": (3, {"weight_decay": 0.1}),
}
HALF = 4


def make_engine(folder: Path, case: str, universal: bool) -> Any:
    import deepspeed

    stage, options = CASES[case]
    own = folder / f"{dist.rank()}.json"
    keys = {"zero_optimization": {"stage": stage}, "checkpoint": {"load_universal": universal}}
    own.write_text(json.dumps(keys | {"gradient_clipping": 0.0}))
    given = {"dataset_name": __file__, "model_name_or_path": ".", "deepspeed": str(own), "zero_stage": stage}
    config = make_config(given)
    model = network()
    optimizer = FusedRMSprop(model.parameters(), lr=1e-3, **options)
    settings = deepspeed_settings(config)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def steps(engine: Any, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        engine.backward(engine(batch.chunk(dist.world_size())[dist.rank()]).square().mean())
        engine.step()


def parameters(engine: Any) -> list[Any]:
    import deepspeed

    results = []
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            results.append(parameter.detach().clone().tolist())
    return results


def main() -> None:
    action, folder = sys.argv[1], Path(sys.argv[2])
    quiet()
    init_process_group()
    results = {}
    for case in CASES:
        engine = make_engine(folder, case, universal=action == "load")
        if action == "save":
            steps(engine, batches()[:HALF])
            engine.save_checkpoint(str(folder / case), tag="half")
        else:
            engine.load_checkpoint(str(folder / case), tag="universal")
        steps(engine, batches()[HALF : 2 * HALF])
        results[case] = {
            "parameters": parameters(engine),
            "states": sorted({name for state in engine.optimizer.optimizer.state.values() for name in state}),
        }
        engine.destroy()
    print_results(results)


if __name__ == "__main__":
    main()
