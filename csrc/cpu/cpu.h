// What the CPU module computes, on raw pointers. All functions are reentrant, and results do not depend on `threads`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../logits.h"
#include "../rmsprop.h"

namespace irlfast {

void rmsprop(const Parameter *parameters, std::size_t count, const RMSprop &options, int threads);

// Of z [n, V], rows `stride` apart, and `bias` [V] or null, with y = softcap(scale * (z + bias)) and E = exp(y - max y),
// and no target skipped, write into
//   logps [n]  the log-probability of each target,
//   sums [n]   the sum of E,
//   z          (E, at the target E - sum E) times the soft-cap's derivative, so that d logp / d (scale * (z + bias)) is
//              -z / sum.
void softmax_slopes(float *z, std::int64_t stride, const float *bias, const Scoring &scoring, float *logps,
                    float *sums, int threads);

// Of logits in fp32 or bf16: log-probabilities logps [n], 0 where skipped, and log-sum-exps lse [n].
void token_logps(const Rows &logits, const Scoring &scoring, float *logps, float *lse, int threads);

// Into `grad`, of the dtype of `logits` and perhaps `logits` itself: upstream [n] times the log-probabilities'
// derivatives by the logits; rows of zeros where the target is skipped or `upstream` is 0.
void write_gradient(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                    const float *upstream, int threads);

}  // namespace irlfast
