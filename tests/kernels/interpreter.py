"""Triton's interpreter keeps bf16 as uint16 and computes on these bits: products and sums are silently wrong."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(data: np.ndarray) -> TensorHandle:
    """To bf16, ties to even, as the GPU rounds; the interpreter's own cast truncates."""
    bits = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16().view(torch.uint16)
    return TensorHandle(bits.numpy().reshape(data.shape), tl.bfloat16)


def repair_bf16() -> None:
    """Widen bf16 operands to fp32 and round results back, for dots, elementwise operations and casts."""
    dot, binary, unary, cast = (
        getattr(InterpreterBuilder, name) for name in ("create_dot", "binary_op", "unary_op", "cast_impl")
    )

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def binary_op(self, lhs, rhs, op):
        if tl.bfloat16 not in (lhs.dtype.scalar, rhs.dtype.scalar):
            return binary(self, lhs, rhs, op)
        result = binary(self, widened(lhs), widened(rhs), op)
        return result if result.data.dtype == np.bool_ else narrowed(result.data)

    def unary_op(self, handle, op):
        if handle.dtype.scalar != tl.bfloat16:
            return unary(self, handle, op)
        return narrowed(unary(self, widened(handle), op).data)

    def cast_impl(self, source, to):
        if to.scalar == tl.bfloat16:
            return narrowed(widened(source).data.astype(np.float32))
        return cast(self, widened(source), to)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = lambda self, source, to, _mode: cast_impl(self, source, to)
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast_impl)
