"""The dtype in which an operation multiplies tensors of several dtypes."""

import torch
from torch import Tensor


def dtype_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the less precise dtype of the two: of bf16 and fp32 bf16, of bf16 and fp16 bf16.

    Under autocast, a tensor counts as one of autocast's dtype. A tensor in fp64 does not: autocast leaves fp64 alone.
    """
    one, other = autocast_dtype(hidden), autocast_dtype(weight)
    return one if torch.finfo(one).eps > torch.finfo(other).eps else other


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to the dtype of the products, in fp32 (fp64). The gradient is not rounded to this dtype."""
    wide = x.to(torch.promote_types(dtype, torch.float32))
    if x.dtype == dtype:
        return wide
    return wide + (x.to(dtype).to(wide.dtype) - wide).detach()
