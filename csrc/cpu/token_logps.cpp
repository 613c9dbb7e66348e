// Log-probabilities of targets from existing logits, and their gradient written over the logits: bound by memory. The
// first pass over a row reads memory, the second reads the cache and prefetches the next row.
#include "cpu.h"
#include "functions.h"
#include "parallel.h"

namespace irlfast {
namespace {

template <bool capped, class T>
IRLFAST_INLINE void score(const T *__restrict__ z, const T *next, const Scoring &s, std::int64_t n, float *logp,
                          float *lse) {
  const SoftCap<capped> final(s.softcap);
  const float scale = s.scale;
  const auto scaled = [=](std::int64_t i) { return widen(z[i]) * scale; };
  const std::int64_t target = s.targets[n];
  const float peak = final(highest(s.vocabulary, scaled));
  const float log_norm =
      std::log(sum(s.vocabulary, next, [=](std::int64_t i) { return exp_negative(final(scaled(i)) - peak); }));
  // A target outside the row is never read: its log-probability is NaN.
  const bool inside = target >= 0 && target < s.vocabulary;
  *logp = inside ? final(scaled(target)) - peak - log_norm : kNaN;
  *lse = peak + log_norm;
}

// `grad` may be `z`.
template <bool capped, class T>
IRLFAST_INLINE void write(T *grad, const T *z, const T *next, const Scoring &s, std::int64_t target, float lse,
                          float upstream) {
  const SoftCap<capped> final(s.softcap);
  const float scale = s.scale, factor = upstream * scale;
  const auto slope = [=](T logit, float wanted) {
    const float y = final(widen(logit) * scale);
    return factor * (wanted - exp_negative(y - lse)) * final.derivative(y);
  };
  const bool inside = target >= 0 && target < s.vocabulary;
  const float at_target = inside ? slope(z[target], 1) : 0;
  in_lanes(s.vocabulary, next, [=](std::int64_t i, int) { narrow_into(grad[i], slope(z[i], 0)); });
  if (inside) narrow_into(grad[target], at_target);
}

template <class Wanted>
std::int64_t next_of(std::int64_t n, std::int64_t last, const Wanted &wanted) {
  do ++n;
  while (n < last && !wanted(n));
  return n;
}

template <class T>
IRLFAST_INLINE void score_rows(const Rows &rows, const Scoring &s, std::int64_t first, std::int64_t last, float *logps,
                               float *lses) {
  const auto wanted = [&](std::int64_t n) { return s.targets[n] != kIgnore; };
  std::fill(logps + first, logps + last, 0.0f);
  std::fill(lses + first, lses + last, 0.0f);
  const T *z = static_cast<const T *>(rows.z);
  for (std::int64_t n = next_of(first - 1, last, wanted), after; n < last; n = after) {
    after = next_of(n, last, wanted);
    const T *row = z + n * rows.stride, *next = z + (after < last ? after : n) * rows.stride;
    if (s.softcap > 0) score<true>(row, next, s, n, logps + n, lses + n);
    if (!(s.softcap > 0)) score<false>(row, next, s, n, logps + n, lses + n);
  }
}

template <class T>
IRLFAST_INLINE void write_rows(const Rows &to, const Rows &from, const Scoring &s, std::int64_t first,
                               std::int64_t last, const float *lses, const float *upstream) {
  for (std::int64_t n = first; n < last; ++n) {
    const T *z = static_cast<const T *>(from.z) + n * from.stride, *next = n + 1 < last ? z + from.stride : z;
    T *grad = static_cast<T *>(to.z) + n * to.stride;
    if (s.targets[n] == kIgnore || upstream[n] == 0)  // a product with 0 would keep the NaN of a skipped row
      std::fill(grad, grad + s.vocabulary, T{});
    else if (s.softcap > 0)
      write<true>(grad, z, next, s, s.targets[n], lses[n], upstream[n]);
    else
      write<false>(grad, z, next, s, s.targets[n], lses[n], upstream[n]);
  }
}

IRLFAST_CLONES void score_any(const Rows &rows, const Scoring &s, std::int64_t first, std::int64_t last, float *logps,
                              float *lses) {
  if (rows.dtype == Dtype::bf16) score_rows<bf16>(rows, s, first, last, logps, lses);
  if (rows.dtype == Dtype::fp32) score_rows<float>(rows, s, first, last, logps, lses);
}

IRLFAST_CLONES void write_any(const Rows &to, const Rows &from, const Scoring &s, std::int64_t first, std::int64_t last,
                              const float *lses, const float *upstream) {
  if (from.dtype == Dtype::bf16) write_rows<bf16>(to, from, s, first, last, lses, upstream);
  if (from.dtype == Dtype::fp32) write_rows<float>(to, from, s, first, last, lses, upstream);
}

}  // namespace

void token_logps(const Rows &logits, const Scoring &scoring, float *logps, float *lse, int threads) {
  parallel(scoring.n, worth_a_thread(scoring.vocabulary), threads, [&](std::int64_t first, std::int64_t last) {
    score_any(logits, scoring, first, last, logps, lse);
  });
}

void write_gradient(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                    const float *upstream, int threads) {
  parallel(scoring.n, worth_a_thread(scoring.vocabulary), threads, [&](std::int64_t first, std::int64_t last) {
    write_any(grad, logits, scoring, first, last, lse, upstream);
  });
}

}  // namespace irlfast
