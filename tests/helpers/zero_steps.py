"""Started by test_zero.py: compare FusedRMSprop under DeepSpeed with PyTorch's RMSprop alone.

Prints JSON. For every ZeRO stage, with and without ``offload_optimizer``: the largest difference of a parameter, and
the dtype and the device of the optimiser's state.
"""

import json
import sys
from pathlib import Path

import torch

from irlfast.common import dist
from irlfast.config import make_config
from irlfast.engine.deepspeed_engine import deepspeed_settings
from irlfast.engine.process_group import init_process_group
from irlfast.optim import FusedRMSprop
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results

OPTIONS, STEPS = {"lr": 1e-3, "weight_decay": 0.1}, 20


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1, bias=False)
    return torch.nn.Sequential(*layers).to(dist.device())


def batches() -> list[torch.Tensor]:
    return list(torch.randn(STEPS, 8, 16, generator=torch.Generator().manual_seed(1)).to(dist.device()))


def plain() -> list[torch.Tensor]:
    model = network()
    optimizer = torch.optim.RMSprop(model.parameters(), **OPTIONS)
    for batch in batches():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def by_deepspeed(own: Path, zero: dict) -> tuple[list[torch.Tensor], set[str]]:
    import deepspeed

    own.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": 0.0}))
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "deepspeed": str(own), "zero_stage": zero["stage"]}
    settings = deepspeed_settings(make_config(keys))
    model = network()
    optimizer = FusedRMSprop(model.parameters(), **OPTIONS)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    for batch in batches():
        engine.backward(engine(batch.chunk(dist.world_size())[dist.rank()]).square().mean())
        engine.step()
    squares = [state["exp_avg_sq"] for state in optimizer.state.values()]
    parameters = []
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=zero["stage"] == 3):
            parameters.append(parameter.detach().clone())
    engine.destroy()
    return parameters, {f"{square.dtype} on {square.device}" for square in squares}


def main() -> None:
    quiet()
    init_process_group()
    expected, results = plain(), {}
    for stage in range(4):
        for offload in ("none", "cpu"):
            own = Path(sys.argv[1]) / f"{dist.rank()}.json"
            zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload == "cpu" else {})
            parameters, state = by_deepspeed(own, zero)
            error = max((p - q).abs().max().item() for p, q in zip(parameters, expected, strict=True))
            results[f"ZeRO {stage}, offload {offload}"] = {"error": error, "state": sorted(state)}
    print_results(results)


if __name__ == "__main__":
    main()
