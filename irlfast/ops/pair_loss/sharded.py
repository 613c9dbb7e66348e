"""A head whose vocabulary is split over the ranks of a process group, as tensor parallelism splits it.

Each rank has some rows of the weight, the same hidden states and the same targets, and multiplies by its own rows only.
A chunk of n tokens needs one collective of 3n numbers, which merges the log-sum-exps of the ranks and takes the
target's logit from its owner. A product with the weight is summed over the ranks. So every rank has the values of the
whole head, the whole gradient by hidden, and its own rows of the gradient by weight and bias.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from irlfast.ops.common.checks import require, values_visible
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss.cpu_slab import exp_, final_logits_
from irlfast.ops.pair_loss.slab import SlabKernels


def process_group(name: Any) -> Any:
    """The group of this name: an operation of torch takes a group by its name alone."""
    return dist.distributed_c10d._resolve_process_group(name)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def vocabulary_of(group: Any, weight: Tensor, targets: Tensor) -> tuple[int, int, int]:
    """The first token of this rank's shard, the rows of the widest shard, and the whole vocabulary's size.

    Raises:
        ValueError: the ranks have different targets.
    """
    total = int(targets.sum()) if values_visible(targets) else 0
    mine = torch.tensor([weight.shape[0], targets.numel(), total], dtype=torch.int64, device=weight.device)
    ranks = all_gather(mine, group).tolist()
    own = dist.get_rank(group)
    for rank, (_, tokens, sum_of_targets) in enumerate(ranks):
        same = [tokens, sum_of_targets] == ranks[own][1:]
        require(same, "targets", targets, "the targets of rank {} of group: all ranks give the same", rank)
    rows = [size for size, *_ in ranks]
    return sum(rows[:own]), max(rows), sum(rows)


def kernels_for(kernels: SlabKernels, scored: ScoredTokens) -> SlabKernels:
    """The kernels of one rank, for a vocabulary that the ranks of ``scored.group`` share."""
    group = process_group(scored.group)

    def times_weight(slab: Tensor, weight: Tensor) -> Tensor:
        product = kernels.times_weight(slab, weight)
        dist.all_reduce(product, group=group)
        return product

    return kernels._replace(softmax=softmax, times_weight=times_weight, fused_logps=None)


def softmax(
    z: Tensor, targets: Tensor, inputs: HeadInputs, scored: ScoredTokens, slopes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See :attr:`SlabKernels.softmax`; z has the rank's columns. The slab is the derivative itself: v is 1."""
    cap = scored.logit_softcap
    final_logits_(z, inputs.bias, scored.logit_scale, cap)
    at = targets - scored.first_token
    owned = (at >= 0) & (at < z.shape[1])
    column = torch.where(owned, at, 0)[:, None]
    picked = torch.where(owned, z.gather(1, column).squeeze(1), torch.nan)
    peak = z.amax(1)
    mass = exp_(z, peak[:, None], cap).squeeze(1)

    group = process_group(scored.group)
    peaks, masses, target_logits = all_gather(torch.stack([peak, mass, picked]), group).unbind(1)
    # One rank owns the target. A target outside the vocabulary has no owner: its log-probability is NaN.
    target_logit = torch.where(target_logits.isnan().all(0), torch.nan, target_logits.nansum(0))
    top = peaks.amax(0)
    norm = (masses * (peaks - top).exp()).sum(0)
    logps = target_logit - top - norm.log()
    if slopes:
        z *= -((peak - top).exp() / norm)[:, None]
        at_target = torch.ones_like(logps) if cap is None else 1 - (target_logit / cap) ** 2
        z.scatter_add_(1, column, torch.where(owned, at_target, 0)[:, None])
    return logps, torch.ones_like(logps), z.to(inputs.weight.dtype) if z.is_cuda else z


def all_gather(tensor: Tensor, group: Any) -> Tensor:
    """The tensors ``[ranks, …]`` of all ranks, equal in shape."""
    ranks = dist.get_world_size(group)
    gathered = torch.empty(ranks * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    dist.all_gather_into_tensor(gathered, tensor.flatten(), group=group)
    return gathered.view(ranks, *tensor.shape)
