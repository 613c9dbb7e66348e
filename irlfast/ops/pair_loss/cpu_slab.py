"""The pair slab in plain PyTorch, for the CPU; and what ``irlfast._cpu`` does there on logits that exist already.

A product of bf16 tensors would round the logits to bf16. Their fp32 copies, multiplied as bf16 (which loses nothing of
them) and summed in fp32, give fp32 logits at up to four times the speed of fp32 products.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from irlfast import native
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss import slab

P = ParamSpec("P")
T = TypeVar("T")

TILE = 8192  # rows of the weight in one product, which packs them, and in bf16 widens them, all at once


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    hidden = hidden.to(out.dtype)
    for part, rows in tiles(weight, out.dtype):
        torch.mm(hidden, rows.T, out=out[:, part])


def softmax(
    z: Tensor, targets: Tensor, side: HeadInputs, scored: ScoredTokens, slopes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """With the slopes in any case: here they are a by-product of the sums."""
    if native.cpu is not None and z.dtype == torch.float32:
        return native_softmax(z, targets, side, scored)
    if side.bias is not None:
        z += side.bias.to(z.dtype)
    if scored.logit_scale != 1:
        z *= scored.logit_scale
    cap = scored.logit_softcap
    if cap is not None:
        z.div_(cap).tanh_().mul_(cap)
    picked, peak = z.gather(1, targets[:, None]), z.amax(1, keepdim=True)
    norm = exp_(z, peak, cap)
    at_target = -norm if cap is None else norm * ((picked / cap) ** 2 - 1)
    z.scatter_add_(1, targets[:, None], at_target)
    return (picked - peak - norm.log()).squeeze(1), -1 / norm.squeeze(1), z


def native_softmax(z: Tensor, targets: Tensor, side: HeadInputs, scored: ScoredTokens) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one pass over memory."""
    logps, sums = torch.empty(2, len(z))
    bias = None if side.bias is None else side.bias.float().contiguous()
    native.cpu.softmax_slopes(
        native.rows(z),
        0 if bias is None else bias.data_ptr(),
        native.scoring(z, targets, scored.logit_scale, scored.logit_softcap),
        logps.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return logps, -1 / sums, z


def token_logps(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Natively: log-probabilities and log-sum-exps ``[N]`` fp32, 0 where skipped, of logits ``[N, V]`` fp32 or bf16."""
    targets = targets.long().contiguous()
    logps, lse = torch.empty(len(targets)), torch.empty(len(targets))
    scoring = native.scoring(logits, targets, scale, softcap)
    native.cpu.token_logps(native.rows(logits), scoring, logps.data_ptr(), lse.data_ptr(), torch.get_num_threads())
    return logps, lse


def write_gradient(
    grad: Tensor,  # [N, V], written; may be logits
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    lse: Tensor,  # [N] fp32
    upstream: Tensor,  # [N] fp32
    scale: float,
    softcap: float | None,
) -> None:
    targets, upstream = targets.long().contiguous(), upstream.contiguous()
    native.cpu.write_gradient(
        native.rows(grad),
        native.rows(logits),
        native.scoring(logits, targets, scale, softcap),
        lse.data_ptr(),
        upstream.data_ptr(),
        torch.get_num_threads(),
    )


def exp_(z: Tensor, peak: Tensor, cap: float | None) -> Tensor:
    """Replace logits z ``[n, V]`` by E = exp(z − peak) times the soft-cap's derivative; return ΣE ``[n, 1]``."""
    if cap is None:
        return z.sub_(peak).exp_().sum(1, keepdim=True)
    norm = torch.zeros_like(peak)
    for part in z.split(TILE, dim=1):
        exp = (part - peak).exp_()
        norm += exp.sum(1, keepdim=True)
        part.div_(cap).square_().neg_().add_(1).mul_(exp)
    return norm


def by_weight(slab: Tensor, weight: Tensor) -> Tensor:
    product = slab.new_zeros(slab.shape[0], weight.shape[1])
    for part, rows in tiles(weight, slab.dtype):
        product.addmm_(slab[:, part], rows)
    return product


def by_hidden(total: Tensor, slab: Tensor, hidden: Tensor, new: bool) -> None:
    total.addmm_(slab.T, hidden, beta=float(not new))


def tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in ``dtype`` by rows, so that what a product keeps of it does not grow with the vocabulary."""
    for start in range(0, weight.shape[0], TILE):
        part = slice(start, min(start + TILE, weight.shape[0]))
        yield part, weight[part].to(dtype)


def multiplied_as_bf16(product: Callable[P, T]) -> Callable[P, T]:
    """fp32 operands are rounded to bf16, where the processor multiplies those; sums and results stay in fp32."""

    @wraps(product)
    def narrow(*args: P.args, **kwargs: P.kwargs) -> T:
        with slab.precision("mkldnn", "bf16"):
            return product(*args, **kwargs)

    return narrow


SLAB_MB = 32  # elementwise steps stay in the last-level cache
EXACT = slab.SlabKernels(SLAB_MB, logits, softmax, by_weight, by_hidden)
NARROW = EXACT._replace(
    logits=multiplied_as_bf16(logits), by_weight=multiplied_as_bf16(by_weight), by_hidden=multiplied_as_bf16(by_hidden)
)


def kernels(policy: HeadInputs) -> slab.SlabKernels:
    return NARROW if policy.weight.dtype == torch.bfloat16 else EXACT
