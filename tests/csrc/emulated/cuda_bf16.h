// In place of CUDA's own header, where kernels run on the CPU.
#pragma once

#include "../../../csrc/numbers.h"

struct __nv_bfloat16 {
  irlfast::bf16 bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return irlfast::widen(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {irlfast::narrow(x)}; }
