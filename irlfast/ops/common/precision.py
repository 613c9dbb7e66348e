"""The precision of products: their dtype for operands of several dtypes, and torch's setting for fp32 operands."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C import _get_fp32_precision_getter as get_precision
from torch._C import _set_fp32_precision_setter as set_precision


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


# ---------------------------------------------------------------- how torch multiplies fp32 operands

MATMUL = "matmul"
in_use = threading.Condition()
users: dict[str, list[str]] = {"cuda": [], "mkldnn": []}  # of each backend: the precision of every block that is open
before: dict[str, str] = {}  # of each backend: the setting that the last of these blocks restores


@contextmanager
def fp32_precision(backend: str, precision: str) -> Iterator[None]:
    """Let a backend of torch multiply fp32 operands in this precision, and restore the user's setting afterwards.

    The setting is the whole process's. Blocks of other threads that want the same precision share it; one that wants
    another waits until they have ended.
    """
    with in_use:
        in_use.wait_for(lambda: all(other == precision for other in users[backend]))
        if not users[backend]:
            before[backend] = own_setting(("generic", "all"), (backend, "all"), (backend, MATMUL))
            set_precision(backend, MATMUL, precision)
        users[backend].append(precision)
    try:
        yield
    finally:
        with in_use:
            users[backend].pop()
            if not users[backend]:
                set_precision(backend, MATMUL, before.pop(backend))
                in_use.notify_all()


def own_setting(*levels: tuple[str, str]) -> str:
    """The setting of the last of torch's levels itself: "none" where it follows the level before it.

    torch only tells the setting in force. Where two levels agree, the first is changed for a moment, to see whether the
    second follows.
    """
    *above, level = levels
    value = get_precision(*level)
    if value == "none" or not above or value != get_precision(*above[-1]):
        return value
    parent = own_setting(*above)
    set_precision(*above[-1], "tf32" if value == "ieee" else "ieee")
    follows = get_precision(*level) != value
    set_precision(*above[-1], parent)
    return "none" if follows else value
