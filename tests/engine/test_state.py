"""The state of training on disk: every value comes back, whatever the processes that write and that read."""

import random
import types

import pytest
import torch
from safetensors.torch import save_file

from irlfast.common import dist
from irlfast.engine import checkpoint, state
from irlfast.engine.state import load_state, save_files, state_files


def become(monkeypatch, rank, count):
    monkeypatch.setattr(dist, "rank", lambda: rank)
    monkeypatch.setattr(dist, "world_size", lambda: count)
    monkeypatch.setattr(dist, "on_main", lambda function, *arguments: function(*arguments))


def partitioned(shapes, rank, count, values):
    """Return an engine as ZeRO-2 lays it out: one flat tensor of all parameters, of which a rank updates its part."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    part = -(-sum(sizes) // (2 * count)) * 2  # DeepSpeed aligns, too
    flat = torch.zeros(part * count)
    pieces = [
        piece.view(shape) for piece, shape in zip(flat.split([*sizes, len(flat) - sum(sizes)]), shapes, strict=False)
    ]
    model = torch.nn.ParameterDict({str(number): torch.nn.Parameter(piece) for number, piece in enumerate(pieces)})
    updated = torch.nn.Parameter(values[: len(flat)][rank * part : (rank + 1) * part].clone())
    states = {updated: {"step": torch.tensor(5.0), "exp_avg": -updated.detach()}}
    optimizer = types.SimpleNamespace(
        bit16_groups_flat=[flat], param_groups=[{"params": [updated]}], state=states, update_lp_params=lambda: None
    )
    return types.SimpleNamespace(
        module=types.SimpleNamespace(model=model), optimizer=optimizer, zero_optimization_stage=lambda: 2
    )


@pytest.mark.parametrize("seed", range(10))
def test_every_value_of_every_partition_comes_back_to_any_other_partitions(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    shapes = [[draw.randint(1, 9) for _ in range(draw.randint(1, 2))] for _ in range(draw.randint(1, 6))]
    total = sum(torch.Size(shape).numel() for shape in shapes)
    values = torch.cat([torch.arange(1.0, total + 1), torch.zeros(100)])  # the rest is what fills the last partition
    monkeypatch.setattr(state, "FILE_BYTES", draw.choice([16, 1 << 30]))
    writers, readers = draw.randint(1, 8), draw.randint(1, 8)
    for rank in range(writers):
        become(monkeypatch, rank, writers)
        save_files(state_files(partitioned(shapes, rank, writers, values)), tmp_path)
    read = []
    for rank in range(readers):
        become(monkeypatch, rank, readers)
        engine = partitioned(shapes, rank, readers, torch.zeros_like(values))
        engine.optimizer.state = {updated: {} for updated in engine.optimizer.state}
        load_state(engine, tmp_path)
        [(updated, states)] = engine.optimizer.state.items()
        read.append((updated.detach(), states.get("exp_avg", torch.zeros_like(updated))))
        assert not states or states["step"] == 5
    weights, averages = (torch.cat(parts)[:total] for parts in zip(*read, strict=True))
    assert torch.equal(weights, values[:total]) and torch.equal(averages, -values[:total])


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6])
def test_metrics_that_no_row_has_yet_are_counted_once_by_any_number_of_processes(tmp_path, monkeypatch, readers):
    (tmp_path / "step-2").mkdir()
    for rank in range(4):
        save_file({"loss": torch.tensor(10.0**rank)}, tmp_path / f"step-2/sums-{rank}.safetensors")
    shares = []
    for rank in range(readers):
        become(monkeypatch, rank, readers)
        shares.append(checkpoint.unlogged(tmp_path, 2)["loss"].item())
    assert sum(shares) == 1111
    assert readers != 4 or shares == [1, 10, 100, 1000]
