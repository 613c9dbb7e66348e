// The functions of the CUDA module, on raw device pointers. They queue work in a stream and do not wait for the GPU. A
// launch that fails raises std::runtime_error with the kernel's name.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../logits.h"
#include "../rmsprop.h"

namespace irlfast {

// Log-probabilities logps [n], 0 where skipped, and log-sum-exps lse [n] of the policy; the log-probabilities
// ref_logps [n] of the reference, unless reference.z is null.
void token_logps(const Rows &policy, const Rows &reference, const Scoring &scoring, float *logps, float *lse,
                 float *ref_logps, void *stream);

// Writes upstream [n] times the derivatives of the log-probabilities by the logits into `grad`, which may be `logits`.
// Rows are zero where the target is skipped or `upstream` is 0.
void write_gradient(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                    const float *upstream, void *stream);

// The middle step of the pair slab: log-probabilities logps [n] from z [n, V] fp32. With `slopes`, their derivatives by
// scale * (z + bias) overwrite z as `slope`, whose rows start where those of z do. `bias` [V] may be null.
void softmax_slopes(float *z, std::int64_t stride, Dtype slope, const float *bias, const Scoring &scoring, float *logps,
                    bool slopes, void *stream);

// Tokens of S sequences: cu_seqlens [S + 1]. The reference's log-probabilities, fp32 or fp64 or null, are per token
// (skipped where the target is) or per sequence.
struct Sequences {
  const float *logps;
  const std::int64_t *targets;
  const std::int32_t *cu_seqlens;
  int count;
  const void *reference;
  Dtype dtype;
  bool per_token;
};

// The log-ratio and the log-probabilities of policy and reference of every sequence: sums [3, S], in fp64.
void sequence_sums(const Sequences &sequences, float *sums, void *stream);

void rmsprop(const Parameter *parameters, std::size_t count, const RMSprop &options, void *stream);

}  // namespace irlfast
