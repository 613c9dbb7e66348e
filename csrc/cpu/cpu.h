// The functions of the CPU module, on raw pointers. They are reentrant, and their results do not depend on `threads`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../logits.h"
#include "../rmsprop.h"

namespace irlfast {

void rmsprop(const Parameter *parameters, std::size_t count, const RMSprop &options, int threads);

// The softmax of z [n, V], rows `stride` apart, with `bias` [V] or null: y = softcap(scale * (z + bias)) and
// E = exp(y - max y). No target is skipped. Writes
//   logps [n]  the log-probability of each target,
//   sums [n]   the sum of E,
//   z          (E, at the target E - sum E) times the soft-cap's derivative, so that d logp / d (scale * (z + bias)) is
//              -z / sum.
void softmax_slopes(float *z, std::int64_t stride, const float *bias, const Scoring &scoring, float *logps,
                    float *sums, int threads);

// Log-probabilities logps [n], 0 where skipped, and log-sum-exps lse [n] from logits in fp32 or bf16.
void token_logps(const Rows &logits, const Scoring &scoring, float *logps, float *lse, int threads);

// Writes upstream [n] times the derivatives of the log-probabilities by the logits into `grad`, which has the dtype of
// `logits` and may be `logits`. Rows are zero where the target is skipped or `upstream` is 0.
void write_gradient(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                    const float *upstream, int threads);

}  // namespace irlfast
