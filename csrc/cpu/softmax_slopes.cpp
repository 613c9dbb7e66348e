// Rows of logits become exponentials in place. The first pass over a row reads memory, the second reads the cache and
// prefetches the next row.
#include "cpu.h"
#include "functions.h"
#include "parallel.h"

namespace irlfast {
namespace {

struct Logits {
  float *z;
  std::int64_t stride;
  const float *bias;
};

template <bool capped, bool biased>
IRLFAST_INLINE void row(const Logits &l, const Scoring &of, std::int64_t n, const float *next, float *logp,
                        float *norm) {
  float *__restrict__ z = l.z + n * l.stride;
  const float *__restrict__ bias = l.bias;
  const float scale = of.scale;
  const std::int64_t target = of.targets[n];
  const SoftCap<capped> final(of.softcap);
  const auto scaled = [=](std::int64_t i) { return (biased ? z[i] + bias[i] : z[i]) * scale; };
  const float peak = final(highest(of.vocabulary, scaled)), picked = final(scaled(target));
  *norm = sum(of.vocabulary, next, [=](std::int64_t i) {
    const float y = final(scaled(i)), e = exp_negative(y - peak);
    z[i] = e * final.derivative(y);
    return e;
  });
  z[target] -= *norm * final.derivative(picked);
  *logp = picked - peak - std::log(*norm);
}

IRLFAST_CLONES void rows(const Logits &l, const Scoring &of, std::int64_t first, std::int64_t last, float *logps,
                         float *sums) {
  for (std::int64_t n = first; n < last; ++n) {
    const float *next = l.z + std::min(n + 1, last - 1) * l.stride;
    if (of.softcap > 0 && l.bias) row<true, true>(l, of, n, next, logps + n, sums + n);
    if (of.softcap > 0 && !l.bias) row<true, false>(l, of, n, next, logps + n, sums + n);
    if (!(of.softcap > 0) && l.bias) row<false, true>(l, of, n, next, logps + n, sums + n);
    if (!(of.softcap > 0) && !l.bias) row<false, false>(l, of, n, next, logps + n, sums + n);
  }
}

}  // namespace

void softmax_slopes(float *z, std::int64_t stride, const float *bias, const Scoring &scoring, float *logps,
                    float *sums, int threads) {
  const Logits logits{z, stride, bias};
  parallel(scoring.n, worth_a_thread(scoring.vocabulary), threads,
           [&](std::int64_t first, std::int64_t last) { rows(logits, scoring, first, last, logps, sums); });
}

}  // namespace irlfast
