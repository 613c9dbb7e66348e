"""``reward_head`` and ``discriminator_loss`` in plain PyTorch: the oracle of the Triton kernels."""

import torch
from torch import Tensor

from irlfast.ops.common.sequences import default_pairs
from irlfast.ops.rewards.losses import REWARD_LOSSES, Options


def head_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, rows: Tensor | None, cu_seqlens: Tensor, token: bool
) -> Tensor:
    """Logits ``[N, M]`` of every token, or ``[S, M]`` of every sequence's last one, 0 where it is empty."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)
    # Cast before selecting: the gradients of a row that is used twice then add up in fp32.
    x, head, bias = hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if token:
            return torch.nn.functional.linear(x if rows is None else x[rows], head, bias)
        present = cu_seqlens.diff()[:, None] > 0
        if (hidden if rows is None else rows).shape[0] == 0:
            x = x[:0].sum(0).expand(len(present), -1)  # no row to select: zeros, with a gradient
        else:
            last = torch.where(present.squeeze(1), cu_seqlens[1:] - 1, 0)
            x = torch.where(present, x[last if rows is None else rows[last]], 0)
        return torch.where(present, torch.nn.functional.linear(x, head, bias), 0)


def loss_of(
    h: Tensor,  # [S, M], or [N, M] per token
    cu_seqlens: Tensor,  # [S + 1]
    labels: Tensor | None,  # [S] bool
    pairs: Tensor | None,  # [P, 2]
    token: bool,
    options: Options,
) -> Tensor:
    """The loss ``[]`` of logits, without the empty sequences."""
    lengths = cu_seqlens.diff()
    if REWARD_LOSSES[options.kind].mean_over == "pairs":
        pairs = default_pairs(len(lengths), h.device) if pairs is None else pairs
        return pair_loss(h, pairs, lengths > 0, options)
    assert labels is not None
    if token:
        labels = labels.repeat_interleave(lengths, output_size=h.shape[0])
        return item_loss(h, labels, torch.ones_like(labels), options)
    return item_loss(h, labels, lengths > 0, options)


def item_loss(h: Tensor, expert: Tensor, present: Tensor, options: Options) -> Tensor:
    """Loss of logits ``[I, M]`` of items, with ``[I]`` bool: whether each is an expert's, and whether it is present."""
    kind = REWARD_LOSSES[options.kind]
    terms = kind.terms(h, expert[:, None], options)
    if kind.mean_over == "all":
        return mean(terms, present)
    return mean(terms, present & expert) + mean(terms, present & ~expert)


def pair_loss(h: Tensor, pairs: Tensor, present: Tensor, options: Options) -> Tensor:
    """Loss of logits ``[S, M]`` over the pairs ``[P, 2]`` whose two sequences are present."""
    used = present[pairs].all(1)
    # Zeros in the place of an absent pair's logits, whose NaN would reach the gradient.
    expert, synthetic = torch.where(used[:, None, None], h[pairs], 0).unbind(1)
    return mean(REWARD_LOSSES[options.kind].terms(expert, synthetic, options), used)


def mean(values: Tensor, used: Tensor) -> Tensor:
    """Mean of values ``[I, M]`` over the used items and over heads; 0 without items."""
    return torch.where(used[:, None], values, 0).sum() / (used.sum().clamp(min=1) * values.shape[1])


def rewards(h: Tensor, options: Options) -> Tensor:
    """The reward of logits of any shape."""
    return REWARD_LOSSES[options.kind].reward(h, options)
