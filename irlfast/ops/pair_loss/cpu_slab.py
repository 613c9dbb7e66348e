"""The pair slab on a CPU: the products of PyTorch's libraries or of ``irlfast._cpu``, and the latter's softmax.

PyTorch's product of bf16 tensors would round the logits to bf16. Instead their fp32 copies, which have the same values,
are multiplied as bf16 and summed in fp32. The copies take as long as the products. On processors with AVX-512 for bf16
that are not Intel's, ``irlfast._cpu`` multiplies the bf16 tensors themselves, and fp32 ones twice as fast as MKL.
"""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from irlfast import native
from irlfast.ops.common.precision import fp32_precision
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss import slab

P = ParamSpec("P")
T = TypeVar("T")

TILE = 8192  # rows of the weight per product: the product copies (and in bf16 widens) them all at once


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    hidden = hidden.to(out.dtype)
    for part, rows in weight_tiles(weight, out.dtype):
        torch.mm(hidden, rows.T, out=out[:, part])


def softmax(
    z: Tensor, targets: Tensor, inputs: HeadInputs, scored: ScoredTokens, slopes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The slab is computed with or without ``slopes``: here it is a by-product of the sums."""
    if native.cpu is not None and z.dtype == torch.float32:
        return native_softmax(z, targets, inputs, scored)
    cap = scored.logit_softcap
    final_logits_(z, inputs.bias, scored.logit_scale, cap)
    picked, peak = z.gather(1, targets[:, None]), z.amax(1, keepdim=True)
    norm = exp_(z, peak, cap)
    at_target = -norm if cap is None else norm * ((picked / cap) ** 2 - 1)
    z.scatter_add_(1, targets[:, None], at_target)
    return (picked - peak - norm.log()).squeeze(1), -1 / norm.squeeze(1), z


def native_softmax(
    z: Tensor, targets: Tensor, inputs: HeadInputs, scored: ScoredTokens
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of :func:`softmax`, by ``irlfast._cpu`` in one pass over memory."""
    logps, sums = torch.empty(2, len(z), dtype=torch.float32, device=z.device)
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    native.cpu.softmax_slopes(
        native.rows(z),
        0 if bias is None else bias.data_ptr(),
        native.scoring(z, targets, scored.logit_scale, scored.logit_softcap),
        logps.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return logps, -1 / sums, z


def final_logits_(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> None:
    """Replace products z ``[n, V]`` by the logits ``softcap(scale · (z + bias))``."""
    if bias is not None:
        z += bias.to(z.dtype)
    if scale != 1:
        z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)


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


def times_weight(slab: Tensor, weight: Tensor) -> Tensor:
    product = slab.new_zeros(slab.shape[0], weight.shape[1])
    for part, rows in weight_tiles(weight, slab.dtype):
        product.addmm_(slab[:, part], rows)
    return product


def add_times_hidden(total: Tensor, slab: Tensor, hidden: Tensor, new: bool) -> None:
    total.addmm_(slab.T, hidden, beta=float(not new))


def weight_tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in ``dtype``, and their place, so that a product's copy does not grow with the vocabulary."""
    for start in range(0, weight.shape[0], TILE):
        part = slice(start, min(start + TILE, weight.shape[0]))
        yield part, weight[part].to(dtype)


def multiplied_as_bf16(product: Callable[P, T]) -> Callable[P, T]:
    """The product with fp32 operands rounded to bf16, if the processor multiplies bf16; sums and results are fp32."""

    @wraps(product)
    def narrow(*args: P.args, **kwargs: P.kwargs) -> T:
        with fp32_precision("mkldnn", "bf16"):
            return product(*args, **kwargs)

    return narrow


EXACT = slab.SlabKernels(
    slab_mb=16,  # elementwise steps then stay in the last-level cache; 32 is 3% faster for a small vocabulary
    logits=logits,
    softmax=softmax,
    times_weight=times_weight,
    add_times_hidden=add_times_hidden,
)
NARROW = EXACT._replace(
    logits=multiplied_as_bf16(logits),
    times_weight=multiplied_as_bf16(times_weight),
    add_times_hidden=multiplied_as_bf16(add_times_hidden),
)


def times_weight_in_fp32(slab: Tensor, weight: Tensor) -> Tensor:
    """For slopes of entropies and divergences, which nearly cancel: rounded to bf16, they erred by 4.5% in a test."""
    with fp32_precision("mkldnn", "ieee"):
        return times_weight(slab, weight)


def native_product(a: Tensor, b: Tensor, out: Tensor, narrow: bool, add: bool = False) -> None:
    """out [m, n] = a [m, k] @ b [k, n], or added to ``out``, in fp32; ``narrow``: the operands are rounded to bf16."""
    if out.stride(1) != 1:
        a, b, out = b.T, a.T, out.T
    a, b = (each if 1 in each.stride() else each.clone(memory_format=torch.contiguous_format) for each in (a, b))
    of = *out.shape, a.shape[1], out.stride(0), narrow, add
    native.cpu.multiply(native.matrix(a), native.matrix(b), out.data_ptr(), of, torch.get_num_threads())


def native_kernels(narrow: bool) -> slab.SlabKernels:
    product = partial(native_product, narrow=narrow)

    def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        product(hidden, weight.T, out)

    def times_weight(slab: Tensor, weight: Tensor) -> Tensor:
        out = slab.new_empty(len(slab), weight.shape[1])
        product(slab, weight, out)
        return out

    def add_times_hidden(total: Tensor, slab: Tensor, hidden: Tensor, new: bool) -> None:
        # Always in fp32: a pair's answers nearly cancel. With bf16 factors, d weight of a trained model erred by 2.4%.
        native_product(slab.T, hidden, total, narrow=False, add=not new)

    return EXACT._replace(logits=logits, times_weight=times_weight, add_times_hidden=add_times_hidden)


NATIVE = {torch.float32: native_kernels(narrow=False), torch.bfloat16: native_kernels(narrow=True)}


def kernels(operands: torch.dtype) -> slab.SlabKernels:
    if operands in NATIVE and hasattr(native.cpu, "multiply"):  # which the module has where it is the fastest
        return NATIVE[operands]
    return NARROW if operands == torch.bfloat16 else EXACT
