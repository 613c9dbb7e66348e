"""Reward heads: linear maps from hidden states to logits, the losses that train them, and the rewards they give.

Words and dimensions as in :mod:`irlfast.ops`, and M heads. Arguments that the operations take:

- ``hidden`` ``[R, H]``, ``head`` ``[M, H]`` and ``bias`` ``[M]``: fp32, bf16, fp16 or fp64, one dtype.
- ``cu_seqlens`` ``[S + 1]`` int32: sequence s has the response tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``; it
  may be empty.
- ``rows`` ``[N]`` int64 or int32: the hidden row of each response token. Tokens may share a row. Default: row n is
  token n's, and R = N.
- ``pooling``: ``"last"`` reads the last response token of each sequence (the end token), ``"token"`` every one.
- ``backend``: ``"plain"`` is the oracle, in plain PyTorch, and copies the rows it reads; ``"cpu"`` is the same code, as
  PyTorch's own products are hard to beat there; ``"triton"`` reads each hidden row once in the forward, on CUDA, in
  fp32, bf16 or fp16, for up to 64 heads. ``"auto"`` takes ``"cpu"`` for CPU tensors and ``"triton"`` for CUDA tensors
  where it can, else ``"plain"``.

Products, statistics and results are in fp32 (fp64 for fp64 inputs), autocast or not. Gradients have the inputs' dtype;
they are summed in fp32 and rounded once. There are no second derivatives by ``"triton"``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.ops.common.checks import (
    FLOATS,
    INTEGERS,
    check_cu_seqlens,
    check_offsets,
    check_pairs,
    check_range,
    check_tensor,
    choose_backend,
    require,
    values_visible,
)
from irlfast.ops.common.sequences import default_pairs
from irlfast.ops.rewards import losses as divergences
from irlfast.ops.rewards.losses import Options, check_options, discriminator_reward

__all__ = ["DiscriminatorLoss", "discriminator_loss", "discriminator_reward", "reward_head"]

MOST_HEADS = 64  # of the triton backend


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

    Arguments as the module says.

    Returns:
        Tensor: ``[S, M]`` for ``pooling="last"``, 0 where the sequence is empty; ``[N, M]`` for ``"token"``; fp32 (fp64
        for fp64 inputs), differentiable in ``hidden``, ``head`` and ``bias``.

    Raises:
        ValueError: a wrong shape, dtype, device or value; it names the argument, what was found and expected.
        RuntimeError: ``backend="triton"`` without Triton.
    """
    backend = check_heads(hidden, head, cu_seqlens, rows, bias, pooling, backend)
    if backend == "triton":
        return head_logits(hidden, head, bias, rows, cu_seqlens, pooling == "token")[0]
    return plain_logits(hidden, head, bias, rows, cu_seqlens, pooling == "token")


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
    backend: str = "auto",
) -> DiscriminatorLoss:
    """Loss of discriminators that tell experts from synthetics by the logit h = log D/(1 − D), and rewards from h.

    :mod:`irlfast.ops.rewards.losses` has the formula of every ``kind``: ``bce``, ``bradley_terry``, and the variational
    bounds (f-GAN, arXiv 1606.00709) of reverse KL (``airl``), JS (``gail``), forward KL (``fairl``) and the
    α-divergence (``alpha``). Expectations are means over the experts' and over the synthetics' sequences, or tokens,
    apart, so that their numbers do not matter; ``bce`` is one mean over all. A mean over nothing is 0. Each head has
    its own loss; they are averaged. Empty sequences have a logit of 0 (and its reward) and no part in the loss, nor
    has a pair with one.

    Arguments as the module says, and

    - ``labels`` ``[S]`` bool, integers or floats: 1 for an expert, 0 for a synthetic. ``bradley_terry`` needs none, and
      where it has them only checks that the pairs agree.
    - ``pairs`` ``[P, 2]`` int64 or int32, for ``bradley_terry`` alone: sequences (expert, synthetic); a sequence may be
      in several or in none. Default: sequences 2i and 2i + 1. It compares sequences, so ``pooling`` must be "last".
    - ``alpha``, for ``kind="alpha"``: any number; 1 is ``airl``, 0 is ``fairl`` with its reward less 1.
    - ``label_smoothing``, for ``bce`` and ``bradley_terry``: the probability that a label, or a pair's order, is wrong.
    - ``f_max``, for ``fairl``: the reward −h·exp(h) (f-MAX, arXiv 1911.02256) in place of exp(h).
    - ``clamp``, at most 80: exponentials of z > ``clamp``, in losses and rewards, go on along the tangent,
      ``exp(clamp) · (1 + z − clamp)``: finite, and never flat; the gradient is exact, exp(min(z, ``clamp``)).

    Returns:
        DiscriminatorLoss: ``loss`` ``[]``, differentiable in ``hidden``, ``head`` and ``bias``; without gradient,
        ``logits`` as of :func:`reward_head` and ``reward`` of every logit. In fp32 (fp64).

    Raises:
        ValueError: a wrong shape, dtype, device or value; it names the argument, what was found and expected.
        RuntimeError: ``backend="triton"`` without Triton.
    """
    backend = check_heads(hidden, head, cu_seqlens, rows, bias, pooling, backend)
    options = Options(kind, alpha, label_smoothing, f_max, clamp)
    check_options(options)
    check_labels(labels, cu_seqlens, kind)
    check_compared(pairs, labels, cu_seqlens, kind, pooling)
    labels = None if kind == "bradley_terry" or labels is None else labels != 0
    token = pooling == "token"
    if backend == "triton":
        return DiscriminatorLoss(
            *discriminate(hidden, head, bias, rows, cu_seqlens, labels, pairs, token, *options)[:3]
        )
    h = plain_logits(hidden, head, bias, rows, cu_seqlens, token)
    loss = plain_loss(h, cu_seqlens, labels, pairs, token, options)
    return DiscriminatorLoss(loss, h.detach(), divergences.rewards(h.detach(), options))


# ---------------------------------------------------------------- plain PyTorch


def plain_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, rows: Tensor | None, cu_seqlens: Tensor, token: bool
) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # Cast before selecting: the gradients of a row that is used twice then add up in fp32.
    x, head, bias = hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if token:
            return torch.nn.functional.linear(x if rows is None else x[rows], head, bias)
        present = cu_seqlens.diff()[:, None] > 0
        if (hidden if rows is None else rows).shape[0] == 0:
            x = x[:0].sum(0).expand(len(present), -1)  # nothing to select from; zeros, with a gradient
        else:
            last = torch.where(present.squeeze(1), cu_seqlens[1:] - 1, 0)
            x = torch.where(present, x[last if rows is None else rows[last]], 0)
        return torch.where(present, torch.nn.functional.linear(x, head, bias), 0)


def plain_loss(
    h: Tensor, cu_seqlens: Tensor, labels: Tensor | None, pairs: Tensor | None, token: bool, options: Options
) -> Tensor:
    lengths = cu_seqlens.diff()
    if labels is None:
        pairs = default_pairs(len(lengths), h.device) if pairs is None else pairs
        return divergences.pair_loss(h, pairs, lengths > 0, options)
    if token:
        labels = labels.repeat_interleave(lengths, output_size=h.shape[0])
        return divergences.item_loss(h, labels, torch.ones_like(labels), options)
    return divergences.item_loss(h, labels, lengths > 0, options)


# ---------------------------------------------------------------- operations by Triton that torch knows


@torch.library.custom_op("irlfast::reward_head", mutates_args=())
def head_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, rows: Tensor | None, cu_seqlens: Tensor, token: bool
) -> tuple[Tensor, Tensor]:
    """Logits, and the hidden row of each sequence, −1 where it is empty; no rows for tokens."""
    from irlfast.kernels import rewards as kernels

    with torch.cuda.device_of(hidden):
        logits, _, _, item_rows, _ = kernels.forward(hidden, head, bias, rows, cu_seqlens, token)
    return logits, item_rows


@head_logits.register_fake
def _(
    hidden: Tensor, head: Tensor, bias: Tensor | None, rows: Tensor | None, cu_seqlens: Tensor, token: bool
) -> tuple[Tensor, Tensor]:
    sequences = cu_seqlens.shape[0] - 1
    outputs = (hidden if rows is None else rows).shape[0] if token else sequences
    logits = hidden.new_empty(outputs, head.shape[0], dtype=torch.float32)
    return logits, cu_seqlens.new_empty(0 if token else sequences, dtype=torch.int64)


def keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, head, _, rows, _, token = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, head, rows if token else output[1])


def head_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    hidden, head, rows = ctx.saved_tensors
    slopes = by_row(upstream, rows, hidden.shape[0])
    return *optional_gradients(ctx, hidden, head, slopes, None), None, None, None


head_logits.register_autograd(head_backward, setup_context=keep_rows)


@torch.library.custom_op("irlfast::discriminator_loss", mutates_args=())
def discriminate(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    labels: Tensor | None,
    pairs: Tensor | None,
    token: bool,
    kind: str,
    alpha: float,
    label_smoothing: float,
    f_max: bool,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, logits, rewards, and the slopes ``[R, M]`` of the loss by the logits of every hidden row."""
    from irlfast.kernels import rewards as kernels

    options = Options(kind, alpha, label_smoothing, f_max, clamp)
    with torch.cuda.device_of(hidden):
        logits, reward, slopes, item_rows, losses = kernels.forward(
            hidden, head, bias, rows, cu_seqlens, token, labels, pairs, options
        )
    return losses.sum(), logits, reward, by_row(slopes, rows if token else item_rows, hidden.shape[0])


@discriminate.register_fake
def _(hidden: Tensor, head: Tensor, bias: Any, rows: Tensor | None, cu_seqlens: Tensor, *rest: Any) -> Any:
    token = rest[2]
    outputs = (hidden if rows is None else rows).shape[0] if token else cu_seqlens.shape[0] - 1
    logits = hidden.new_empty(outputs, head.shape[0], dtype=torch.float32)
    return logits.new_empty(()), logits, torch.empty_like(logits), logits.new_empty(hidden.shape[0], head.shape[0])


def keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], inputs[1], output[3])


def loss_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, head, slopes = ctx.saved_tensors
    return *optional_gradients(ctx, hidden, head, slopes, upstream), *[None] * 10


discriminate.register_autograd(loss_backward, setup_context=keep_slopes)


def by_row(slopes: Tensor, rows: Tensor | None, height: int) -> Tensor:
    """Sums ``[R, M]`` over the items ``[I, M]`` that read each hidden row; −1 is none. The heads are linear, so that a
    row that is read twice needs nothing else; deterministic where torch is asked to be."""
    if rows is None:
        return slopes
    total = slopes.new_zeros(height, slopes.shape[1])
    return total if height == 0 else total.index_add(0, rows.clamp(min=0), torch.where(rows[:, None] >= 0, slopes, 0))


def optional_gradients(
    ctx: Any, hidden: Tensor, head: Tensor, slopes: Tensor, upstream: Tensor | None
) -> list[Tensor | None]:
    """By hidden, head and bias, None for what needs none."""
    wanted = list(ctx.needs_input_grad[:3])
    found = gradients(hidden, head, slopes, upstream, wanted)
    return [gradient if needed else None for gradient, needed in zip(found, wanted, strict=True)]


@torch.library.custom_op("irlfast::reward_head_backward", mutates_args=())
def gradients(
    hidden: Tensor, head: Tensor, slopes: Tensor, upstream: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, head and bias; nothing in those that are not wanted."""
    from irlfast.kernels import rewards as kernels

    with torch.cuda.device_of(hidden):
        found = kernels.backward(hidden, head, slopes, upstream, wanted)
    first, second, third = (hidden.new_empty(0) if gradient is None else gradient for gradient in found)
    return first, second, third


@gradients.register_fake
def _(hidden: Tensor, head: Tensor, slopes: Tensor, upstream: Any, wanted: list[bool]) -> Any:
    shapes = hidden.shape, head.shape, head.shape[:1]
    return tuple(hidden.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


# ---------------------------------------------------------------- checks


def check_heads(
    hidden: Tensor,
    head: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    pooling: str,
    backend: str,
) -> str:
    """The backend, chosen."""
    device = getattr(hidden, "device", torch.device("cpu"))
    check_tensor(hidden, "hidden", "[R, H]", FLOATS, device)
    check_tensor(head, "head", "[M, H]", (hidden.dtype,), device)
    (heads, columns), size = head.shape, hidden.shape[1]
    fits = heads > 0 and 0 < columns == size
    require(fits, "head", head, "[M, {}] with M > 0 and H > 0, as hidden has H columns", size)
    if bias is not None:
        check_tensor(bias, "bias", "[M]", (hidden.dtype,), device)
        require(bias.shape[0] == heads, "bias", bias, "[{}], as head has that many rows", heads)
    check_offsets(cu_seqlens, device)
    if rows is not None:
        check_tensor(rows, "rows", "[N]", INTEGERS, device)
    require(pooling in ("last", "token"), "pooling", pooling, "'last' or 'token'")
    whose = "the rows of hidden, where rows is None" if rows is None else "the number of rows"
    check_cu_seqlens(cu_seqlens, (hidden if rows is None else rows).shape[0], whose)
    if rows is not None:
        check_range(rows, "rows", 0, hidden.shape[0], ", the rows of hidden")
    if backend == "auto" and heads > MOST_HEADS:
        backend = "plain"
    backend = choose_backend(backend, hidden, "hidden", ("auto", "plain", "cpu", "triton"))
    few = backend != "triton" or heads <= MOST_HEADS
    require(few, "head", head, f"at most {MOST_HEADS} heads by backend 'triton'; 'plain' takes any number")
    return backend


def check_labels(labels: Tensor | None, cu_seqlens: Tensor, kind: str) -> None:
    if labels is None:
        require(kind == "bradley_terry", "labels", labels, f"a tensor [S] for kind {kind!r}")
        return
    check_tensor(labels, "labels", "[S]", (torch.bool, *INTEGERS, *FLOATS), cu_seqlens.device)
    sequences = cu_seqlens.shape[0] - 1
    require(labels.shape[0] == sequences, "labels", labels, "[{}], the sequences of cu_seqlens", sequences)
    if values_visible(labels.device):
        wrong = labels[(labels != 0) & (labels != 1)]
        require(wrong.numel() == 0, "labels", wrong[0].item() if wrong.numel() else 0, "1 (expert) or 0 (synthetic)")


def check_compared(pairs: Tensor | None, labels: Tensor | None, cu_seqlens: Tensor, kind: str, pooling: str) -> None:
    if kind != "bradley_terry":
        require(pairs is None, "pairs", pairs, f"None for kind {kind!r}")
        return
    require(pooling == "last", "pooling", pooling, "'last' for kind 'bradley_terry', which compares sequences")
    check_pairs(pairs, cu_seqlens)
    if labels is not None and values_visible(cu_seqlens.device):
        ordered = labels.view(-1, 2) if pairs is None else labels[pairs]
        agree = bool(((ordered[:, 0] != 0) & (ordered[:, 1] == 0)).all())
        require(agree, "labels", labels, "1 for the first and 0 for the second sequence of every pair")
