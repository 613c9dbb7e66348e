"""Scores of a process, by prompt group."""

import torch

from irlfast.sampling.scoring import Share


def by_group(share: Share) -> dict[int, list[torch.Tensor]]:
    """The values of each answer of the groups that a process has scored."""
    groups: dict[int, list[torch.Tensor]] = {}
    each = torch.from_numpy(share.values).split(share.lengths.tolist())
    for group, values in zip(share.groups.tolist(), each, strict=True):
        groups.setdefault(group, []).append(values)
    return groups
