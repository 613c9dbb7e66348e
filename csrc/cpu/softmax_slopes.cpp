// Rows of logits become exponentials in place. A row is read from memory once: the second and third time it is in the
// cache.
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu.h"
#include "parallel.h"

namespace irlfast {
namespace {

// exp(x) for x <= 0 within 1 ulp, 0 below x = -87; NaN stays NaN. Cody and Waite's reduction to
// |r| <= ln(2)/2, then the Taylor polynomial of degree 7, whose error there is 5e-9.
IRLFAST_INLINE float exp_negative(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + shift;
  const float k = shifted - shift;
  const float r = (clamped - k * 0.693145752f) - k * 1.42860677e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // 2^k, of whose sum with the shift only the low bits stay
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

// tanh(x): odd, from exp(-2|x|); by its series where 1 - exp(-2|x|) would cancel.
IRLFAST_INLINE float tanh_any(float x) {
  const float size = std::fabs(x), e = exp_negative(-2 * size), square = x * x;
  const float series = size * (1 + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
  return std::copysign(size < 0.15f ? series : (1 - e) / (1 + e), x);
}

template <bool capped, bool biased>
IRLFAST_INLINE void row(float *__restrict__ z, const float *__restrict__ bias, std::int64_t vocabulary,
                        std::int64_t target, float scale, float cap, float *logp, float *sum) {
  float peak = -std::numeric_limits<float>::infinity();
  const float inverse = capped ? 1 / cap : 0;
#pragma omp simd reduction(max : peak)
  for (std::int64_t i = 0; i < vocabulary; ++i) {
    float y = z[i];
    if constexpr (biased) y += bias[i];
    y *= scale;
    if constexpr (capped) y = cap * tanh_any(y * inverse);
    z[i] = y;
    peak = y > peak ? y : peak;
  }
  const float picked = z[target];
  float norm = 0;
#pragma omp simd reduction(+ : norm)
  for (std::int64_t i = 0; i < vocabulary; ++i) {
    const float e = exp_negative(z[i] - peak);
    norm += e;
    if constexpr (capped) {
      const float t = z[i] * inverse;
      z[i] = e * (1 - t * t);
    } else {
      z[i] = e;
    }
  }
  const float t = capped ? picked * inverse : 0;
  z[target] -= norm * (1 - t * t);
  *logp = picked - peak - std::log(norm);
  *sum = norm;
}

IRLFAST_CLONES void rows(const Logits &l, std::int64_t first, std::int64_t last, float *logps, float *sums) {
  for (std::int64_t n = first; n < last; ++n) {
    float *z = l.z + n * l.stride;
    if (l.softcap > 0 && l.bias) row<true, true>(z, l.bias, l.vocabulary, l.targets[n], l.scale, l.softcap, logps + n, sums + n);
    if (l.softcap > 0 && !l.bias) row<true, false>(z, l.bias, l.vocabulary, l.targets[n], l.scale, l.softcap, logps + n, sums + n);
    if (!(l.softcap > 0) && l.bias) row<false, true>(z, l.bias, l.vocabulary, l.targets[n], l.scale, 0, logps + n, sums + n);
    if (!(l.softcap > 0) && !l.bias) row<false, false>(z, l.bias, l.vocabulary, l.targets[n], l.scale, 0, logps + n, sums + n);
  }
}

constexpr std::int64_t kLeast = 1 << 14;  // logits that are worth a thread

}  // namespace

void softmax_slopes(const Logits &logits, float *logps, float *sums, int threads) {
  const std::int64_t least = kLeast / std::max<std::int64_t>(logits.vocabulary, 1) + 1;
  parallel(logits.n, least, threads, [&](std::int64_t first, std::int64_t last) { rows(logits, first, last, logps, sums); });
}

}  // namespace irlfast
