// The softmax of a row of logits, by the threads of a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../numbers.h"
#include "reduce.h"
#include "vector.h"

namespace irlfast {

constexpr int kThreads = 256;  // the most per block

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

IRLFAST_INLINE float widen(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow_into(__half &to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow_into(__nv_bfloat16 &to, float x) { to = __float2bfloat16_rn(x); }

// exp(x) without exact subnormal results: so few instructions per element that memory stays the bound.
__device__ __forceinline__ float exp_fast(float x) {
  const float y = x * 1.44269504f;
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
#else
  return std::exp2(y);
#endif
}

// Within 4e-7 relative. 1 - 2/(1 + e) cancels near 0: an odd polynomial (a least-squares fit) replaces it there.
__device__ __forceinline__ float tanh_fast(float u) {
  const float w = u * u;
  const float near = u + u * w * (((0.01642126f * w - 0.05266348f) * w + 0.13320599f) * w - 0.33332941f);
  return w < 0.3f ? near : 1 - __fdividef(2, 1 + exp_fast(2 * u));
}

// Final logits softcap(scale * (z + bias)), and the derivative of the soft-cap at each.
template <bool capped, bool biased>
struct Final {
  float scale, cap;
  const float *bias;

  __device__ __forceinline__ float operator()(float z, int at, float *derivative = nullptr) const {
    if constexpr (biased) z += bias[at];
    if constexpr (capped) {
      const float t = tanh_fast(z * (scale / cap));
      if (derivative) *derivative = 1 - t * t;
      return cap * t;
    } else {
      return z * scale;
    }
  }
};

// The log-sum-exp of the elements so far: peak + log(sum).
struct Softmax {
  float peak, sum;
};

constexpr Softmax kNothing{-kInfinity, 0};

template <int count>
__device__ __forceinline__ void add(Softmax &seen, const float (&values)[count]) {
  float peak = seen.peak, sum = 0;
#pragma unroll
  for (float value : values) peak = fmaxf(peak, value);
  const float base = peak == -kInfinity ? 0 : peak;  // -inf - -inf would be NaN
#pragma unroll
  for (float value : values) sum += exp_fast(value - base);
  seen = {peak, seen.sum * exp_fast(seen.peak - base) + sum};
}

__device__ __forceinline__ Softmax merged(Softmax a, Softmax b) {
  const float peak = fmaxf(a.peak, b.peak), base = peak == -kInfinity ? 0 : peak;
  return {peak, a.sum * exp_fast(a.peak - base) + b.sum * exp_fast(b.peak - base)};
}

__device__ __forceinline__ Softmax from_lane(Softmax x, int mask) {
  return {__shfl_xor_sync(0xffffffffu, x.peak, mask), __shfl_xor_sync(0xffffffffu, x.sum, mask)};
}

// Whole warps, and only so many that each thread has a vector of 16 bytes.
inline unsigned threads_for(std::int64_t elements) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((elements / 8 + 31) / 32 * 32, 32, kThreads));
}

// A row is cut into the elements before the first aligned vector, whole vectors, and the elements after the last one.
// The first and the last together are its `edges`, fewer elements than two vectors have.
struct Split {
  int head, vectors, edges, width;

  __device__ __forceinline__ int edge(int k) const { return k < head ? k : k + vectors * width; }
};

template <class T, int width>
__device__ __forceinline__ Split split(const T *row, int vocabulary) {
  const int beyond = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / sizeof(T) % width);
  const int head = min(beyond ? width - beyond : 0, vocabulary), vectors = (vocabulary - head) / width;
  return {head, vectors, vocabulary - vectors * width, width};
}

template <int rounds, class T, int width, class Logit>
__device__ __forceinline__ void add_vectors(Softmax &seen, const Vector<T, width> *body, int first, int head,
                                            const Logit &logit) {
  Vector<T, width> loaded[rounds];
  float values[rounds * width];
#pragma unroll
  for (int r = 0; r < rounds; ++r) loaded[r] = body[first + r * blockDim.x];
#pragma unroll
  for (int r = 0; r < rounds; ++r)
#pragma unroll
    for (int k = 0; k < width; ++k)
      values[r * width + k] = logit(widen(loaded[r].at[k]), head + (first + r * blockDim.x) * width + k);
  add(seen, values);
}

// This thread's part of a row: vectors of 16 bytes, several at once, so that enough loads are in flight.
template <class T, class Logit>
__device__ __forceinline__ Softmax scan(const T *row, int vocabulary, const Logit &logit) {
  constexpr int width = 16 / sizeof(T), rounds = 4;
  const Split s = split<T, width>(row, vocabulary);
  const auto *body = reinterpret_cast<const Vector<T, width> *>(row + s.head);
  const int threads = blockDim.x;
  Softmax seen = kNothing;
  if (static_cast<int>(threadIdx.x) < s.edges) {
    const int at = s.edge(threadIdx.x);
    add(seen, {logit(widen(row[at]), at)});
  }
  int first = threadIdx.x;
  for (; first + (rounds - 1) * threads < s.vectors; first += rounds * threads)
    add_vectors<rounds>(seen, body, first, s.head, logit);
  for (; first < s.vectors; first += threads) add_vectors<1>(seen, body, first, s.head, logit);
  return seen;
}

// The target's final logit; NaN for a target outside the row, which is never read.
template <class T, class Logit>
__device__ __forceinline__ float picked(const T *row, std::int64_t target, int vocabulary, const Logit &logit) {
  const bool inside = target >= 0 && target < vocabulary;
  return inside ? logit(widen(row[target]), static_cast<int>(target)) : kNaN;
}

}  // namespace irlfast
