"""A head whose vocabulary is split over the ranks of a process group, against the whole head."""

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from irlfast import ops
from tests.helpers.ops_cases import converted, gradients, make
from tests.helpers.ranks import on_ranks
from tests.helpers.tiers import covering_cases

SHARED = ("weight", "bias", "ref_weight", "ref_bias")  # the arguments that have a row per token of the vocabulary


def own_rows(case: dict, sizes: list[int], rank: int) -> dict:
    """The case with this rank's rows of the head, as new leaves."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().split(sizes)[rank].clone().requires_grad_(tensor.requires_grad)

    return case | {name: rows(case[name]) for name in SHARED if case.get(name) is not None}


def results_of(case: dict, loss: bool, **options) -> dict:
    """Every result of an operation, and the gradients of one function of them."""
    if loss:
        result = ops.pair_loss(**case, beta=0.3, nll_weight=0.1, **options)
        output = result.loss
    else:
        result = ops.log_ratio(**case, **options)
        output = result.log_ratio.square().sum() + result.token_logps.sum()
    values = {name: value.detach() for name, value in result._asdict().items() if value is not None}
    return values | {f"d {name}": value for name, value in gradients(output, case).items()}


def compare(case: dict, sizes: list[int], rank: int, group: dist.ProcessGroup | None, **options) -> None:
    part = own_rows(case, sizes, rank)
    tolerance = 1e-5 if case["hidden"].dtype == torch.float32 else 1e-10
    for loss in (True, False):
        whole = results_of(case, loss)
        for name, value in results_of(part, loss, group=group, **options).items():
            expected = whole[name]
            if name in ("d weight", "d bias"):
                expected = expected.split(sizes)[rank]
            torch.testing.assert_close(
                value, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(
    "case",
    covering_cases(
        {
            "ranks": [1, 2, 4],
            "sizes": ["even", "uneven", "one row"],
            "dtype": [torch.float64, torch.float32],
            "bias": [False, True],
            "softcap": [None, 3.0],
            "scale": [1.0, 0.4, -1.5],
            "rows": [False, True],
            "reference": ["none", "hidden", "token", "sequence"],
            "frozen": [False, True],
            "buffer_mb": [1024, 1e-4],  # the latter has room for a few rows: groups are computed twice
        }
    ),
)
def test_a_split_vocabulary_has_the_values_and_gradients_of_the_whole(case):
    ranks, dtype, buffer_mb = case.pop("ranks"), case.pop("dtype"), case.pop("buffer_mb")
    sizes = {"even": [5] * ranks, "uneven": [3 + 4 * r for r in range(ranks)], "one row": [1] * ranks}[
        case.pop("sizes")
    ]
    whole = converted(make([3, 5, 0, 2], vocabulary=sum(sizes), ignored=True, seed=ranks, **case), dtype)
    on_ranks(ranks, lambda rank: compare(whole, sizes, rank, dist.group.WORLD, buffer_mb=buffer_mb))


def test_groups_of_some_ranks_share_a_vocabulary_each():
    case = make([4, 2, 3, 3], vocabulary=9)

    def on_rank(rank: int) -> None:
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        compare(case, [4, 5], rank // 2, groups[rank % 2])

    on_ranks(4, on_rank)


def test_extreme_logits_of_one_rank_leave_the_others_finite():
    case = make([3, 2], vocabulary=8)
    case["weight"].data[:4] *= 1e3  # rank 0 has all the mass, or none

    on_ranks(2, lambda rank: compare(case, [4, 4], rank, dist.group.WORLD))


def test_ranks_with_other_targets_are_refused_on_every_rank():
    case = make([3, 2], vocabulary=8)

    def on_rank(rank: int) -> None:
        part = own_rows(case, [4, 4], rank)
        part["targets"] = (part["targets"] + rank) % 8
        with pytest.raises(ValueError, match=f"expected the targets of rank {1 - rank} of group"):
            ops.log_ratio(**part, group=dist.group.WORLD)

    on_ranks(2, on_rank)


@pytest.mark.parametrize("option", [{"backend": "plain"}, {"skip_mass": 1e-4}])
def test_options_that_a_split_vocabulary_has_not_are_refused(option):
    case = make([3, 2], vocabulary=8)

    def on_rank(rank: int) -> None:
        with pytest.raises(ValueError, match=r"group: found|skip_mass: found"):
            ops.pair_loss(**own_rows(case, [4, 4], rank), beta=0.1, group=dist.group.WORLD, **option)

    on_ranks(2, on_rank)


# ---------------------------------------------------------------- DTensor


def distributed(case: dict, placements: list, mesh) -> dict:
    """The case with its head as distributed tensors, which are new leaves."""
    return case | {
        name: distribute_tensor(case[name].detach(), mesh, placements).requires_grad_(case[name].requires_grad)
        for name in SHARED
        if case.get(name) is not None
    }


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)], [Replicate()]], ids=str)
def test_distributed_tensors_are_gathered_and_their_gradients_averaged(placements):
    case = make([4, 2, 3, 3], vocabulary=7, reference="hidden")
    expected = results_of(case, loss=True)

    def on_rank(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        here = distributed(case, placements, mesh)
        here["hidden"] = (case["hidden"].detach() * (rank + 1)).requires_grad_()  # ranks have other data, as in FSDP
        result = results_of(here, loss=True)
        mine = results_of(case | {"hidden": here["hidden"]}, loss=True)
        torch.testing.assert_close(result["loss"], mine["loss"])
        torch.testing.assert_close(result["d hidden"], mine["d hidden"])
        both = [torch.empty_like(mine["d weight"]) for _ in range(2)]
        dist.all_gather(both, mine["d weight"])
        torch.testing.assert_close(result["d weight"].full_tensor(), torch.stack(both).mean(0))
        assert result["d weight"].placements == here["weight"].placements
        if rank == 0:
            torch.testing.assert_close(result["loss"], expected["loss"])

    on_ranks(2, on_rank)


def test_a_distributed_tensor_split_over_the_group_is_used_without_gathering():
    case = make([4, 2, 3, 3], vocabulary=7, bias=True, reference="hidden")
    expected = results_of(case, loss=True)

    def on_rank(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        result = results_of(distributed(case, [Shard(0)], mesh), loss=True, group=mesh.get_group())
        for name in ("loss", "log_ratio", "d hidden"):
            torch.testing.assert_close(result[name], expected[name])
        for name in ("d weight", "d bias"):
            torch.testing.assert_close(result[name].full_tensor(), expected[name])

    on_ranks(2, on_rank)


def test_a_distributed_tensor_split_in_another_way_is_refused():
    case = make([3, 2], vocabulary=8)

    def on_rank(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        message = re.escape("weight: found '[Shard(dim=1)] over (2,) ranks', expected a DTensor with [Shard(dim=0)]")
        with pytest.raises(ValueError, match=message):
            ops.log_ratio(**distributed(case, [Shard(1)], mesh), group=mesh.get_group())

    on_ranks(2, on_rank)
