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

// Elements of a matrix are `row` and `column` apart, and one of the two is 1.
struct Matrix {
  const void *data;
  Dtype dtype;  // fp32 or bf16
  std::int64_t row, column;
};

struct Product {
  std::int64_t m, n, k;
  std::int64_t stride;  // of the rows of c
  bool narrow;          // the operands are rounded to bf16; bf16 ones need it. Sums are in fp32 in any case
  bool add;             // to c, which is written otherwise
};

// c [m, n] = a [m, k] b [k, n] in fp32. For processors of which multiplies() holds.
void multiply(const Matrix &a, const Matrix &b, float *c, const Product &product, int threads);

// Whether multiply() is the fastest here. MKL has no AVX-512 for processors that are not Intel's; oneDNN has, but takes
// bf16 only with results in bf16, or widened by a copy. Intel's own are served well by both.
bool multiplies();

// Log-probabilities logps [n], 0 where skipped, and log-sum-exps lse [n] from logits in fp32 or bf16.
void token_logps(const Rows &logits, const Scoring &scoring, float *logps, float *lse, int threads);

// Writes upstream [n] times the derivatives of the log-probabilities by the logits into `grad`, which has the dtype of
// `logits` and may be `logits`. Rows are zero where the target is skipped or `upstream` is 0.
void write_gradient(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                    const float *upstream, int threads);

}  // namespace irlfast
