// Rows of logits become exponentials in place. A row is read from memory once, the second time from the cache; and
// while it is, the next row comes from memory.
#include "cpu.h"
#include "functions.h"
#include "parallel.h"

namespace irlfast {
namespace {

template <bool capped, bool biased>
IRLFAST_INLINE void row(const Logits &l, std::int64_t n, const float *next, float *logp, float *norm) {
  float *__restrict__ z = l.z + n * l.stride;
  const float *__restrict__ bias = l.bias;
  const float scale = l.scale;
  const SoftCap<capped> final(l.softcap);
  const auto scaled = [=](std::int64_t i) { return (biased ? z[i] + bias[i] : z[i]) * scale; };
  const float peak = final(highest(l.vocabulary, scaled)), picked = final(scaled(l.targets[n]));
  *norm = sum(l.vocabulary, next, [=](std::int64_t i) {
    const float y = final(scaled(i)), e = exp_negative(y - peak);
    z[i] = e * final.derivative(y);
    return e;
  });
  z[l.targets[n]] -= *norm * final.derivative(picked);
  *logp = picked - peak - std::log(*norm);
}

IRLFAST_CLONES void rows(const Logits &l, std::int64_t first, std::int64_t last, float *logps, float *sums) {
  for (std::int64_t n = first; n < last; ++n) {
    const float *next = l.z + std::min(n + 1, last - 1) * l.stride;
    if (l.softcap > 0 && l.bias) row<true, true>(l, n, next, logps + n, sums + n);
    if (l.softcap > 0 && !l.bias) row<true, false>(l, n, next, logps + n, sums + n);
    if (!(l.softcap > 0) && l.bias) row<false, true>(l, n, next, logps + n, sums + n);
    if (!(l.softcap > 0) && !l.bias) row<false, false>(l, n, next, logps + n, sums + n);
  }
}

}  // namespace

void softmax_slopes(const Logits &logits, float *logps, float *sums, int threads) {
  parallel(logits.n, worth_a_thread(logits.vocabulary), threads,
           [&](std::int64_t first, std::int64_t last) { rows(logits, first, last, logps, sums); });
}

}  // namespace irlfast
