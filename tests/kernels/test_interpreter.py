"""The interpreter, on which other tests rely: bf16 loads, arithmetic, dots and stores round as on a GPU."""

import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def bf16_kernel(a, b, dot, total, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(dot + at, tl.dot(x, y))
    tl.store(total + at, x.to(tl.float32) * 3 + y)


def test_bf16_rounds_as_on_a_gpu():
    a, b = (torch.randn(16, 16, device=DEVICE).bfloat16() for _ in range(2))
    dot, total = torch.empty(16, 16, device=DEVICE), torch.empty_like(a)
    bf16_kernel[(1,)](a, b, dot, total, SIZE=16)
    torch.testing.assert_close(dot, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, (a.float() * 3 + b.float()).bfloat16())
