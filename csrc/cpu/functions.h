// exp and tanh without branches, which compile to vector instructions; and loops over such lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../numbers.h"

namespace irlfast {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// exp(x) for x <= 0 within 1 ulp (1.4 where the processor cannot fuse products and sums), 0 below x = -87; NaN stays
// NaN. Cody and Waite's reduction to |r| <= ln(2)/2, where the minimax polynomial of degree 6 errs by 2e-9.
IRLFAST_INLINE float exp_negative(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + shift;
  const float k = shifted - shift;
  const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
  float p = 0.0013836835f;
  p = p * r + 0.008374824f;
  p = p * r + 0.041668225f;
  p = p * r + 0.1666642f;
  p = p * r + 0.4999999f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // 2^k: only the low bits of the sum with the shift stay
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;  // below -87 the computation above is invalid
}

// tanh(x) within 4e-7 relative, NaN stays NaN: a rational function fitted to [0, 8], beyond which tanh is 1 - 2e-7.
IRLFAST_INLINE float tanh_any(float x) {
  x = x > 8.0f ? 8.0f : x;
  x = x < -8.0f ? -8.0f : x;
  const float u = x * x;
  float p = 1.5230517e-8f;
  p = p * u + 2.1894733e-5f;
  p = p * u + 3.5716023e-3f;
  p = p * u + 0.13444501f;
  p = p * u + 1.0f;
  float q = 8.5224872e-7f;
  q = q * u + 3.411299e-4f;
  q = q * u + 0.026164459f;
  q = q * u + 0.4677783f;
  q = q * u + 1.0f;
  return x * p / q;
}

template <bool capped>
struct SoftCap {
  float cap, inverse;

  IRLFAST_INLINE explicit SoftCap(float c) : cap(c), inverse(capped ? 1 / c : 0) {}
  IRLFAST_INLINE float operator()(float x) const { return capped ? cap * tanh_any(x * inverse) : x; }
  IRLFAST_INLINE float derivative(float y) const {  // y: the result of operator()
    return capped ? 1 - (y * inverse) * (y * inverse) : 1;
  }
};

// So many lanes that the latency of one step of a reduction does not delay the next.
constexpr int kLanes = 32;

// Calls work(i, lane) for i of 0 .. count - 1, and prefetches `next` [count], which is read afterwards.
template <class T, class Work>
IRLFAST_INLINE void in_lanes(std::int64_t count, const T *next, const Work &work) {
  std::int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    for (int k = 0; next && k < kLanes; k += 64 / sizeof(T)) __builtin_prefetch(next + first + k, 0, 2);
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) work(first + k, k);
  }
  for (; first < count; ++first) work(first, 0);
}

template <class Value>
IRLFAST_INLINE float highest(std::int64_t count, const Value &value) {  // of value(0 .. count - 1), without NaNs
  float peaks[kLanes];
  for (float &peak : peaks) peak = -kInfinity;
  const auto raise = [&](float x, int lane) { peaks[lane] = x > peaks[lane] ? x : peaks[lane]; };
  in_lanes(count, static_cast<const float *>(nullptr), [&](std::int64_t i, int lane) { raise(value(i), lane); });
  for (float peak : peaks) raise(peak, 0);
  return peaks[0];
}

// The sum of value(0 .. count - 1), in blocks: a lane that sums a whole row would lose many small values.
template <class T, class Value>
IRLFAST_INLINE float sum(std::int64_t count, const T *next, const Value &value) {
  constexpr std::int64_t block = 64 * kLanes;
  float totals[kLanes] = {};
  for (std::int64_t first = 0; first < count; first += block) {
    float sums[kLanes] = {};
    const std::int64_t size = count - first < block ? count - first : block;
    in_lanes(size, next ? next + first : next, [&](std::int64_t i, int lane) { sums[lane] += value(first + i); });
    for (int k = 0; k < kLanes; ++k) totals[k] += sums[k];
  }
  float total = 0;
  for (float part : totals) total += part;
  return total;
}

}  // namespace irlfast
