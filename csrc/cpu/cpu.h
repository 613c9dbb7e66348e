// What the CPU module computes, on raw pointers. All functions are reentrant, and results do not depend on `threads`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace irlfast {

using bf16 = std::uint16_t;  // its bits

struct RMSprop {
  float lr, alpha, eps, weight_decay, momentum;
  float grad_scale;  // gradients are multiplied by it: a clipping factor, or -1 to maximise
};

// One parameter of n elements. `average` is null unless centred, `buffer` unless there is momentum, `copy` unless the
// parameter itself is bf16 and `param` its fp32 master. Exactly one of `grad` and `grad_bf16` is given.
struct Parameter {
  std::int64_t n;
  float *param, *square, *average, *buffer;
  const float *grad;
  const bf16 *grad_bf16;
  bf16 *copy;
};

void rmsprop(const Parameter *parameters, std::size_t count, const RMSprop &options, int threads);

// Rows of logits: z [n, V] fp32, rows `stride` apart, overwritten; `targets` [n]; `bias` [V] or null.
struct Logits {
  float *z;
  std::int64_t n, vocabulary, stride;
  const std::int64_t *targets;
  const float *bias;
  float scale, softcap;  // no soft-cap: 0
};

// With logits y = softcap(scale * (z + bias)) and E = exp(y - max y), write into
//   logps [n]  the log-probability of each target,
//   sums [n]   the sum of E,
//   z          (E, at the target E - sum E) times the soft-cap's derivative, so that d logp / d (scale * (z + bias)) is
//              -z / sum.
void softmax_slopes(const Logits &logits, float *logps, float *sums, int threads);

}  // namespace irlfast
