"""Distributed tensors (``torch.distributed.tensor.DTensor``: FSDP2, tensor parallelism) as arguments of operations."""

from typing import Any

from torch import Tensor

from irlfast.ops.common.checks import require


def head_tensors(hidden: Any, weight: Any, bias: Any, group: Any = None, prefix: str = "") -> tuple[Any, Any, Any]:
    """The tensors of a head and its hidden states, without DTensors; see :func:`as_tensor`."""
    named = (("hidden", hidden), ("weight", weight), ("bias", bias))
    hidden, weight, bias = (as_tensor(value, prefix + name, group) for name, value in named)
    return hidden, weight, bias


def as_tensor(value: Any, name: str, group: Any) -> Any:
    """The plain tensor that an operation computes with; a value that is no DTensor as it is.

    With a ``group`` that shares the vocabulary, a DTensor that is split by rows over this very group gives its own
    rows. Any other DTensor is gathered. Its gradient is the mean of the gradients of all ranks, as FSDP takes it: ranks
    with other data are averaged, and ranks with the same data have the same gradient.

    Raises:
        ValueError: with ``group``, the DTensor is split in another way.
    """
    if not isinstance(value, Tensor) or not hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import Partial, Shard

    tensor: Any = value
    if group is None or name.endswith("hidden"):
        return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
    mesh, placements = tensor.device_mesh, tensor.placements
    fits = placements == (Shard(0),) and mesh.get_group().group_name == group.group_name
    found = f"{list(placements)} over {mesh.shape} ranks"
    require(fits, name, found, "a DTensor with [Shard(dim=0)] over the ranks of group, or the rank's own rows")
    return tensor.to_local()
