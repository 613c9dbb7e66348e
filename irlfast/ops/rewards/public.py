"""Reward heads: linear maps from hidden states to logits, the losses that train them, and the rewards they give.

Dimensions: N response tokens, R hidden rows, S sequences, P pairs, H hidden size, M heads.

Arguments that the operations take:

- ``hidden`` ``[R, H]``, ``head`` ``[M, H]`` and ``bias`` ``[M]``: fp32, bf16, fp16 or fp64, each of its own dtype.
- ``cu_seqlens`` ``[S + 1]`` int32: sequence s has the response tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``; it
  may be empty.
- ``rows`` ``[N]`` int64 or int32: the hidden row of each response token. Tokens may share a row. Default: row n is that
  of token n, and R = N.
- ``pooling``: ``"last"`` reads the last response token of each sequence (the end token), ``"token"`` every one.
- ``backend``: ``"plain"`` is the oracle, in plain PyTorch, and copies the rows it reads. ``"cpu"`` is the same code:
  PyTorch's own products are hard to beat there. ``"triton"`` reads each hidden row once in the forward, on CUDA, in
  fp32, bf16 or fp16, for up to 64 heads. ``"auto"`` takes ``"cpu"`` for CPU tensors and ``"triton"`` for CUDA tensors
  where it can, else ``"plain"``.

Values are checked on a CPU, and on a GPU where the environment has ``IRLFAST_CHECK=1``. Elsewhere, ``cu_seqlens``,
``rows`` and ``pairs`` that point outside are undefined behaviour: ``"triton"`` reads memory out of bounds.

Products, statistics and results are in fp32 (fp64 where ``hidden`` or ``head`` is). No tensor is rounded, under
autocast too: reading ``hidden`` takes the time, because a head has few rows, and its products do not. So an fp32 head
on bf16 hidden states keeps its digits. Each gradient has its own tensor's dtype; it is summed in fp32 and rounded once.
``"triton"`` has no second or forward-mode derivatives, and does not work inside transformations of torch.func.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.checks import FLOATS, is_dense, require, savable
from irlfast.ops.rewards import custom_op, plain
from irlfast.ops.rewards.checks import check_compared, check_heads, check_labels, check_options, is_paired
from irlfast.ops.rewards.losses import Options


class DiscriminatorLoss(NamedTuple):
    """Result of :func:`discriminator_loss`; only ``loss`` carries a gradient."""

    loss: Tensor  # []
    logits: Tensor  # [S, M], or [N, M] per token
    reward: Tensor  # as logits


def reward_head(
    hidden: Tensor,  # [R, H]
    head: Tensor,  # [M, H]
    cu_seqlens: Tensor,  # [S + 1]
    *,
    rows: Tensor | None = None,  # [N]
    bias: Tensor | None = None,  # [M]
    pooling: str = "last",
    backend: str = "auto",
) -> Tensor:
    """Logits ``hidden @ headᵀ + bias`` of the last token of each sequence, or of every response token.

    See the module for the arguments.

    Returns:
        Tensor: ``[S, M]`` for ``pooling="last"``, 0 where the sequence is empty; ``[N, M]`` for ``"token"``; fp32 (fp64
        for fp64 inputs), differentiable in ``hidden``, ``head`` and ``bias``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names the argument.
        RuntimeError: ``backend="triton"`` without Triton.
    """
    backend = check_heads(hidden, head, cu_seqlens, rows, bias, pooling, backend)
    return head_logits(hidden, head, bias, rows, cu_seqlens, pooling == "token", backend)


def discriminator_loss(
    hidden: Tensor,  # [R, H]
    head: Tensor,  # [M, H]
    cu_seqlens: Tensor,  # [S + 1]
    labels: Tensor | None,  # [S]
    *,
    kind: str = "bce",
    rows: Tensor | None = None,  # [N]
    bias: Tensor | None = None,  # [M]
    pooling: str = "last",
    pairs: Tensor | None = None,  # [P, 2]
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    f_max: bool = False,
    clamp: float = 20.0,
    regularization: float = 0.0,
    backend: str = "auto",
) -> DiscriminatorLoss:
    """Loss of discriminators that tell experts from synthetics by the logit h = log D/(1 − D), and rewards from h.

    :data:`irlfast.ops.rewards.losses.REWARD_LOSSES` has every ``kind``, and its module the formulas: ``bradley_terry``,
    ``linear``, ``bce``, and the variational bounds (f-GAN, arXiv 1606.00709) of reverse KL (``airl``), JS (``gail``),
    forward KL (``fairl``) and the α-divergence (``alpha``).

    A bound takes the mean over the experts' sequences, or tokens, and that over the synthetics', so that their numbers
    do not matter; ``bce`` is one mean over all. A mean over nothing is 0. The loss is the mean over heads.
    An empty sequence has a logit of 0 (and the reward of 0), and no part in the loss; neither has a pair with one.

    See the module for the arguments. Further ones:

    - ``labels`` ``[S]`` bool, integers or floats: 1 for an expert, 0 for a synthetic. ``bradley_terry`` and ``linear``
      need none; if given, only the order of the pairs is checked by them.
    - ``pairs`` ``[P, 2]`` int64 or int32, for ``bradley_terry`` and ``linear``: sequences (expert, synthetic). A
      sequence may be in several pairs or in none. Default: sequences 2i and 2i + 1. Such a loss compares sequences, so
      ``pooling`` must be "last".
    - ``alpha``, for ``kind="alpha"``: any number; 1 is ``airl``, 0 is ``fairl`` with its reward less 1.
    - ``label_smoothing``, for ``bce`` and ``bradley_terry``: the probability that a label, or a pair's order, is wrong.
    - ``f_max``, for ``fairl``: the reward −h·exp(h) (f-MAX, arXiv 1911.02256) in place of exp(h).
    - ``clamp``, at most 80: exponentials of z > ``clamp``, in losses and rewards, go on along the tangent,
      ``exp(clamp) · (1 + z − clamp)``: finite, and never flat; the gradient is exact, exp(min(z, ``clamp``)).
    - ``regularization``, for ``linear``: λ, the weight of the squared logits.

    Returns:
        DiscriminatorLoss: ``loss`` ``[]``, differentiable in ``hidden``, ``head`` and ``bias``; without gradient,
        ``logits`` as of :func:`reward_head` and ``reward`` of every logit. In fp32 (fp64).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names the argument.
        RuntimeError: ``backend="triton"`` without Triton.
    """
    backend = check_heads(hidden, head, cu_seqlens, rows, bias, pooling, backend)
    options = check_options(Options(kind, alpha, label_smoothing, f_max, clamp, regularization))
    check_labels(labels, cu_seqlens, kind)
    check_compared(pairs, labels, cu_seqlens, kind, pooling)
    labels = None if is_paired(kind) or labels is None else labels != 0
    pairs = None if pairs is None else savable(pairs)
    token = pooling == "token"
    if backend == "triton" and custom_op.has_formula(kind):
        loss, logits, reward, _ = custom_op.discriminate(
            hidden, head, bias, rows, cu_seqlens, labels, pairs, token, *options
        )
        return DiscriminatorLoss(loss, logits, reward)
    h = head_logits(hidden, head, bias, rows, cu_seqlens, token, backend)
    loss = plain.loss_of(h, cu_seqlens, labels, pairs, token, options)
    return DiscriminatorLoss(loss, h.detach(), plain.rewards(h.detach(), options))


def discriminator_reward(
    logits: Tensor, *, kind: str, alpha: float = 0.5, f_max: bool = False, clamp: float = 20.0
) -> Tensor:
    """Reward of discriminator logits of any shape, as :func:`discriminator_loss` gives it; differentiable."""
    options = check_options(Options(kind, alpha=alpha, f_max=f_max, clamp=clamp))
    fits = isinstance(logits, Tensor) and logits.dtype in FLOATS and is_dense(logits)
    require(fits, "logits", logits, "a tensor of floats")
    return plain.rewards(logits.to(torch.promote_types(logits.dtype, torch.float32)), options)


def head_logits(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    token: bool,
    backend: str,
) -> Tensor:
    hidden, head, rows = savable(hidden), savable(head), None if rows is None else savable(rows)
    if backend == "triton":
        logits: Tensor = custom_op.head_logits(hidden, head, bias, rows, cu_seqlens, token)[0]
        return logits
    return plain.head_logits(hidden, head, bias, rows, cu_seqlens, token)
