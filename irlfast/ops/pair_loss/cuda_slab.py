"""The pair slab on a GPU with the softmax of ``csrc/cuda`` between the vendor's products."""

import torch
from torch import Tensor

from irlfast import native
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss import triton_slab


def softmax(
    z: Tensor, targets: Tensor, inputs: HeadInputs, scored: ScoredTokens, slopes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The slab lies in the memory of ``z``, in the precision of the products that take it."""
    logps = torch.empty(len(z), dtype=torch.float32, device=z.device)
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    native.cuda.softmax_slopes(
        native.rows(z),
        native.name(inputs.weight.dtype),
        0 if bias is None else bias.data_ptr(),
        native.scoring(z, targets, scored.logit_scale, scored.logit_softcap),
        logps.data_ptr(),
        slopes,
        native.stream(z.device),
    )
    return logps, torch.ones_like(logps), z.view(inputs.weight.dtype)[:, : z.shape[1]]


KERNELS = triton_slab.KERNELS._replace(softmax=softmax, fused_logps=None)
