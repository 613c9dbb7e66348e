"""A vocabulary that is split over ranks, by the kernels of each backend for a GPU."""

import os

import pytest
import torch
import torch.distributed as dist

from irlfast import ops
from tests.helpers.ops_cases import converted, gradients, make
from tests.helpers.ranks import on_ranks
from tests.helpers.tiers import full


@full
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="gloo's ranks share no GPU")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_split_vocabulary_has_the_values_and_gradients_of_the_whole(backend, frozen):
    case = converted(make([3, 5, 2, 2], vocabulary=40, bias=True, softcap=4.0, frozen=frozen), torch.float32)
    whole = ops.pair_loss(**case, beta=0.3)
    exact = gradients(whole.loss, case)

    def on_rank(rank: int) -> None:
        rows = slice(24 * rank, 24 + 16 * rank)  # 24 on one rank, 16 on the other
        own = {name: case[name].detach()[rows].clone().requires_grad_(not frozen) for name in ("weight", "bias")}
        result = ops.pair_loss(**case | own, beta=0.3, backend=backend, group=dist.group.WORLD)
        torch.testing.assert_close(result.log_ratio, whole.log_ratio)
        for name, gradient in gradients(result.loss, case | own).items():
            expected = exact[name] if name == "hidden" else exact[name][rows]
            torch.testing.assert_close(gradient, expected, msg=lambda m, n=name: f"{n}: {m}")

    on_ranks(2, on_rank)
