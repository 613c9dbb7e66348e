// 16-bit numbers, on the host and on the device.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define IRLFAST_INLINE __host__ __device__ __forceinline__
#else
#define IRLFAST_INLINE inline __attribute__((always_inline))
#endif

namespace irlfast {

using bf16 = std::uint16_t;  // its bits

IRLFAST_INLINE float widen(float x) { return x; }

IRLFAST_INLINE float widen(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

IRLFAST_INLINE bf16 narrow(float x) {  // to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<bf16>(x != x ? 0x7fc0 : rounded);
}

IRLFAST_INLINE void narrow_into(float &to, float x) { to = x; }
IRLFAST_INLINE void narrow_into(bf16 &to, float x) { to = narrow(x); }

}  // namespace irlfast
