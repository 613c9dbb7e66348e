"""Linear heads on hidden states: logits with a discriminator's loss, rewards and slopes in one launch; gradients.

Both directions are bound by memory: the forward reads every hidden row that counts once for all heads; the backward
reads it once more and writes its gradient once. The M products run on the tensor cores, padded to 16 heads: without
them, eight heads would take about as long as the memory does. (The forward in fp32 does without, because sums on tensor
cores lose 1e-5.) Vectors have 16 bytes where H is a multiple of 16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("bradley_terry", "bce", "airl", "gail", "fairl", "alpha")  # the losses that have their formula here
LOG_2 = tl.constexpr(0.6931471805599453)
COUNTED = tl.constexpr(256)  # sequences that a program counts per iteration
PROGRAMS = 1024  # of the backward: several waves on any GPU; the last one, which is not full, costs little


# ---------------------------------------------------------------- formulas
# A NaN passes through all of them. That is why they do without tl.minimum and tl.maximum, which drop it.


@triton.jit
def logistic(z, y):
    """``y · softplus(−z) + (1 − y) · softplus(z)`` and its slope, without cancellation."""
    t = tl.exp(-tl.abs(z))
    s = t / (2 + t)
    q = s * s  # log1p(t) = 2 artanh(s), s ≤ 1/3
    log1p = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
    value = tl.where(z > 0, (1 - y) * z, -y * z) + log1p
    large, small = 1 / (1 + t), t / (1 + t)
    return value, (1 - y) * tl.where(z > 0, large, small) - y * tl.where(z > 0, small, large)


@triton.jit
def exponential(z, CLAMP: tl.constexpr):
    """exp, continued along its tangent beyond CLAMP, and its slope."""
    slope = tl.exp(tl.where(z > CLAMP, CLAMP, z))
    return slope * (1 + tl.where(z > CLAMP, z - CLAMP, 0.0)), slope


@triton.jit
def power(h, K: tl.constexpr, CLAMP: tl.constexpr):
    """``(exp(K h) − 1) / K``, which is h for K = 0, and its slope."""
    if K == 0:
        value, slope = h, tl.full(h.shape, 1.0, tl.float32)
    else:
        z = K * h
        value, slope = exponential(z, CLAMP)
        series = z * (1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7 * (1 + z / 8)))))))
        value = tl.where(tl.abs(z) < 0.5, series, value - 1) * (1 / K)
    return value, slope


@triton.jit
def loss_terms(h, expert, LOSS: tl.constexpr):
    """Return each logit's term in the mean of its class, and the slope of the term."""
    if LOSS.kind == "bce":
        value, slope = logistic(h, tl.where(expert, 1 - LOSS.label_smoothing, LOSS.label_smoothing))
    elif LOSS.kind == "gail":
        value, slope = logistic(h, tl.where(expert, 1.0, 0.0))
        value, slope = (value - LOG_2) / 2, slope / 2
    else:
        ALPHA: tl.constexpr = 1.0 if LOSS.kind == "airl" else 0.0 if LOSS.kind == "fairl" else LOSS.alpha
        gain, gain_slope = power(h, -ALPHA, LOSS.clamp)
        cost, cost_slope = power(h, 1 - ALPHA, LOSS.clamp)
        value, slope = tl.where(expert, -gain, cost), tl.where(expert, -gain_slope, cost_slope)
    return value, slope


@triton.jit
def reward_of(h, LOSS: tl.constexpr):
    reward = h
    if LOSS.kind == "gail":
        reward = logistic(h, 0.0)[0]
    elif LOSS.kind == "fairl":
        reward = exponential(h, LOSS.clamp)[0] * (-h if LOSS.f_max else 1.0)
    elif LOSS.kind == "alpha":
        reward = power(h, 1 - LOSS.alpha, LOSS.clamp)[0]
    return reward


# ---------------------------------------------------------------- items: tokens, sequences, or the sequences of pairs


@triton.jit
def sequence_of(item, pairs, paired):
    """The sequence of an item. With ``pairs``, items are the sequences of all pairs, and then all sequences."""
    if pairs is not None:
        of_pair = tl.load(pairs + item, mask=item < paired, other=0).to(tl.int32)
        item = tl.where(item < paired, of_pair, item - paired)
    return item


@triton.jit
def sequence_with(token, cu_seqlens, S):
    """The last sequence that starts at or before each token, by bisection."""
    low = token * 0
    step = S
    while step > 1:
        step = (step + 1) // 2
        middle = low + step
        starts = tl.load(cu_seqlens + middle, mask=middle < S, other=2**31 - 1)
        low = tl.where(starts <= token, middle, low)
    return low


@triton.jit
def length_of(sequence, inside, cu_seqlens):
    first = tl.load(cu_seqlens + sequence, mask=inside, other=0)
    return tl.load(cu_seqlens + sequence + 1, mask=inside, other=0) - first


@triton.jit
def both_present(item, pairs, paired, cu_seqlens):
    """Return whether an item belongs to a pair without an empty sequence."""
    inside = item < paired
    length = length_of(sequence_of(item, pairs, paired), inside, cu_seqlens)
    return (length > 0) & (length_of(sequence_of(item ^ 1, pairs, paired), inside, cu_seqlens) > 0)


@triton.jit
def count_pairs(pairs, paired, cu_seqlens):
    total = tl.zeros([COUNTED], tl.int32)
    for start in range(0, paired, COUNTED):
        total += both_present(start + tl.arange(0, COUNTED), pairs, paired, cu_seqlens).to(tl.int32)
    return tl.sum(total, axis=0) // 2


@triton.jit
def count_items(labels, cu_seqlens, S, TOKEN: tl.constexpr):
    """The number of tokens, or of non-empty sequences, of the experts and of the others."""
    experts = tl.zeros([COUNTED], tl.int32)
    others = tl.zeros([COUNTED], tl.int32)
    for start in range(0, S, COUNTED):
        sequence = start + tl.arange(0, COUNTED)
        length = length_of(sequence, sequence < S, cu_seqlens)
        count = length if TOKEN else (length > 0).to(tl.int32)
        expert = tl.load(labels + sequence, mask=sequence < S, other=0) != 0
        experts += tl.where(expert, count, 0)
        others += tl.where(expert, 0, count)
    return tl.sum(experts, axis=0), tl.sum(others, axis=0)


@triton.jit
def weighted_pairs(h, item, paired, pairs, cu_seqlens, LOSS: tl.constexpr):
    """Half of a pair's term for each of its two items, the slope by the item's logit, and the weight in the mean."""
    sign = tl.where(item % 2 == 0, 1.0, -1.0)[:, None]
    PAIRS: tl.constexpr = h.shape[0] // 2
    margin = tl.sum(tl.reshape(sign * h, (PAIRS, 2, h.shape[1])), axis=1)
    u = tl.reshape(tl.broadcast_to(margin[:, None, :], (PAIRS, 2, h.shape[1])), h.shape)
    value, slope = logistic(u, 1 - LOSS.label_smoothing)
    used = both_present(item, pairs, paired, cu_seqlens)
    weight = tl.where(used, 1 / tl.maximum(count_pairs(pairs, paired, cu_seqlens), 1), 0.0)
    return value / 2, sign * slope, weight


@triton.jit
def weighted_items(h, sequence, present, labels, cu_seqlens, S, TOKEN: tl.constexpr, LOSS: tl.constexpr):
    """The term of each item, its slope, and its weight in the mean over its class or over all items."""
    expert = tl.load(labels + sequence, mask=present, other=0) != 0
    value, slope = loss_terms(h, expert[:, None], LOSS)
    experts, others = count_items(labels, cu_seqlens, S, TOKEN)
    if LOSS.kind == "bce":
        experts, others = experts + others, experts + others
    return value, slope, tl.where(present, 1 / tl.where(expert, experts, others).to(tl.float32), 0.0)


# ---------------------------------------------------------------- forward


@triton.jit
def project(hidden, head, bias, row, present, head_index, H, M, BLOCK_H: tl.constexpr):
    """Logits [rows, heads] in fp32; 0 where a row is not present."""
    total = tl.zeros([row.shape[0], head_index.shape[0]], tl.float32)
    for start in range(0, H, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
        x = tl.load(hidden + row[:, None] * H + k[None, :], mask=present[:, None] & (k < H)[None, :], other=0.0)
        w = tl.load(
            head + head_index[None, :] * H + k[:, None], mask=(head_index < M)[None, :] & (k < H)[:, None], other=0.0
        )
        if x.dtype != w.dtype:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")  # fp32 products in fp32, not in tf32
    if bias is not None:
        total += tl.load(bias + head_index, mask=head_index < M, other=0.0).to(tl.float32)[None, :]
    return tl.where(present[:, None], total, 0.0)


@triton.jit(
    do_not_specialize=["items", "S"],  # also, Triton 3.6 compiles no bisection that S = 1 ends before it begins
    do_not_specialize_on_alignment=["rows", "cu_seqlens", "labels", "pairs"],
)
def forward_kernel(
    hidden, head, bias, rows, cu_seqlens, labels, pairs, logits, reward, slopes, item_rows, losses, items, S, H, M,
    LOSS: tl.constexpr, TOKEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program per block of items; LOSS is None for logits alone."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = item < items
    paired = items if pairs is None else items - S
    if TOKEN:
        present, at, out = inside, item, item
    else:
        out = sequence_of(item, pairs, paired)
        at = tl.load(cu_seqlens + out + 1, mask=inside, other=0) - 1
        present = length_of(out, inside, cu_seqlens) > 0
    row = (at if rows is None else tl.load(rows + at, mask=present, other=0)).to(tl.int64)
    if not TOKEN:
        tl.store(item_rows + item, tl.where(present, row, -1), mask=inside)

    m = tl.arange(0, HEADS)
    h = project(hidden, head, bias, row, present, m, H, M, BLOCK_H)
    stored = inside[:, None] & (m < M)[None, :]
    # A sequence may be in several pairs. Its last item, which is of no pair, alone writes its logits.
    alone = stored if pairs is None else stored & (item >= paired)[:, None]
    tl.store(logits + out.to(tl.int64)[:, None] * M + m[None, :], h, mask=alone)
    if LOSS is not None:
        tl.store(reward + out.to(tl.int64)[:, None] * M + m[None, :], reward_of(h, LOSS), mask=alone)
        if LOSS.kind == "bradley_terry":
            value, slope, weight = weighted_pairs(h, item, paired, pairs, cu_seqlens, LOSS)
        else:
            sequence = sequence_with(item, cu_seqlens, S) if TOKEN else out
            value, slope, weight = weighted_items(h, sequence, present, labels, cu_seqlens, S, TOKEN, LOSS)
        counts = stored & (weight > 0)[:, None]
        weight = (weight / M)[:, None]
        tl.store(
            slopes + item.to(tl.int64)[:, None] * M + m[None, :], tl.where(counts, slope * weight, 0.0), mask=stored
        )
        loss = tl.sum(tl.sum(tl.where(counts, value * weight, 0.0), axis=1), axis=0)
        tl.store(losses + tl.program_id(0), loss)


def forward(
    hidden: Tensor,  # [R, H]
    head: Tensor,  # [M, H]
    bias: Tensor | None,  # [M]
    rows: Tensor | None,  # [N]
    cu_seqlens: Tensor,  # [S + 1]
    token: bool,
    labels: Tensor | None = None,  # [S] bool
    pairs: Tensor | None = None,  # [P, 2] int64
    options: Any = None,  # irlfast.ops.rewards.losses.Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits and rewards ``[S or N, M]``, slopes ``[I, M]``, hidden rows ``[I]``, and the parts of the loss, in fp32.

    Items are tokens or sequences; for pairs, they are the 2P sequences of ``pairs`` and then all sequences. The slopes
    are the derivatives of the loss by the logits of the items. The row of an empty sequence is −1; there are no rows
    for tokens. The parts add up to the loss. Without ``options``, only logits and rows are computed.
    """
    (height, size), heads, sequences = hidden.shape, head.shape[0], cu_seqlens.numel() - 1
    outputs = (height if rows is None else rows.numel()) if token else sequences
    items = outputs if pairs is None else pairs.numel() + sequences
    padded = max(16, triton.next_power_of_2(heads))
    block = 64 if items > 64 * 128 else 16  # many small programs for few items; even, for pairs

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    logits, item_rows = empty(outputs, heads), cu_seqlens.new_empty(0 if token else items, dtype=torch.int64)
    discriminates = options is not None
    reward, slopes = (empty(n if discriminates else 0, heads) for n in (outputs, items))
    losses = empty(triton.cdiv(items, block) if discriminates else 0)
    forward_kernel[(triton.cdiv(items, block),)](
        *(None if x is None else x.contiguous() for x in (hidden, head, bias, rows, cu_seqlens, labels, pairs)),
        *(logits, reward, slopes, item_rows, losses, items, sequences, size, heads),
        LOSS=options,
        TOKEN=token,
        BLOCK=block,
        BLOCK_H=max(
            16, (32 if torch.float32 in (hidden.dtype, head.dtype) else 128 if size % 16 == 0 else 64) * 16 // padded
        ),
        HEADS=padded,
        num_warps=4,
        num_stages=4,
    )
    return logits, reward, slopes, item_rows, losses


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["upstream"])
def backward_kernel(
    hidden, head, slopes, upstream, d_hidden, d_head, d_bias, R, H, M, per_part,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, part of the rows).

    The parts of ``d_head`` [parts, M, H] and ``d_bias`` [parts, M] are summed afterwards. Rows whose slopes are all 0
    are not read: they may hold any values.
    """
    column, part = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H), tl.program_id(1)
    m = tl.arange(0, HEADS)
    of_head = (m < M)[:, None] & (column < H)[None, :]
    w = tl.load(head + m[:, None] * H + column[None, :], mask=of_head, other=0.0).to(tl.float32)
    scale = 1.0 if upstream is None else tl.load(upstream)
    head_sum = tl.zeros([HEADS, BLOCK_H], tl.float32)
    bias_sum = tl.zeros([HEADS], tl.float32)
    first = part * per_part
    for start in range(first, min(first + per_part, R), BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        of_slopes = (row < R)[:, None] & (m < M)[None, :]
        slope = tl.load(slopes + row[:, None] * M + m[None, :], mask=of_slopes, other=0.0) * scale
        at = row[:, None] * H + column[None, :]
        if d_hidden is not None:
            product = tl.dot(slope, w, input_precision="tf32x3")  # as good as fp32
            tl.store(d_hidden + at, product, mask=(row < R)[:, None] & (column < H)[None, :])
        if d_head is not None:
            used = tl.max((slope != 0).to(tl.int32), axis=1) > 0
            x = tl.load(hidden + at, mask=used[:, None] & (column < H)[None, :], other=0.0).to(tl.float32)
            head_sum = tl.dot(tl.trans(slope), x, head_sum, input_precision="tf32x3")
        bias_sum += tl.sum(slope, axis=0)
    if d_head is not None:
        out = d_head + (part.to(tl.int64) * M + m)[:, None] * H + column[None, :]
        tl.store(out, head_sum, mask=of_head)
    if d_bias is not None and tl.program_id(0) == 0:
        tl.store(d_bias + part * M + m, bias_sum, mask=m < M)


def backward(
    hidden: Tensor,  # [R, H]
    head: Tensor,  # [M, H]
    slopes: Tensor,  # [R, M] fp32
    upstream: Tensor | None,  # [] fp32: multiplies the slopes
    wanted: list[bool],  # by hidden, by head, by bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The wanted gradients of ``Σ upstream · slopes · (hidden @ headᵀ + bias)``: by ``hidden`` and ``head`` in their
    dtypes, by ``bias`` in fp32.
    """
    (height, size), heads = hidden.shape, head.shape[0]
    padded = max(16, triton.next_power_of_2(heads))
    block, columns = 16, (2048 if size % 16 == 0 else 1024) // padded  # narrower where nothing is aligned
    blocks = triton.cdiv(size, columns)
    parts = max(1, min(triton.cdiv(height, block), PROGRAMS // blocks))
    per_part = triton.cdiv(triton.cdiv(height, block), parts) * block

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
    d_head = empty(parts, heads, size) if wanted[1] else None
    d_bias = empty(parts, heads) if wanted[2] else None
    backward_kernel[(blocks, parts)](
        *(hidden.contiguous(), head.contiguous(), slopes.contiguous(), upstream, d_hidden, d_head, d_bias),
        *(height, size, heads, per_part),
        BLOCK=block,
        BLOCK_H=columns,
        HEADS=padded,
        num_warps=4,
        num_stages=4,
    )
    d_head = None if d_head is None else d_head.sum(0).to(head.dtype)
    return d_hidden, d_head, None if d_bias is None else d_bias.sum(0)
