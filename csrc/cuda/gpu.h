// What the CUDA module computes, on raw device pointers, in the order of a stream: nothing waits for the GPU. A launch
// that fails raises std::runtime_error with the kernel's name.
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

// Into `grad`, which may be `logits`: upstream [n] times the log-probabilities' derivatives by the logits; rows of
// zeros where the target is skipped or `upstream` is 0.
void write_gradient(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                    const float *upstream, void *stream);

// The middle step of the pair slab: logps [n] of z [n, V] fp32, which with `slopes` becomes, in its own memory and in
// `slope`, their derivatives by scale * (z + bias). Rows of `slope` start where those of z do. `bias` [V] may be null.
void softmax_slopes(float *z, std::int64_t stride, Dtype slope, const float *bias, const Scoring &scoring, float *logps,
                    bool slopes, void *stream);

// Tokens of S sequences: cu_seqlens [S + 1]. The reference's log-probabilities, fp32 or fp64, or null, are those of
// tokens (skipped as their targets are) or of sequences.
struct Sequences {
  const float *logps;
  const std::int64_t *targets;
  const std::int32_t *cu_seqlens;
  int count;
  const void *reference;
  Dtype dtype;
  bool per_token;
};

// Log-ratio, policy's and reference's log-probability of every sequence: sums [3, S], added up in fp64.
void sequence_sums(const Sequences &sequences, float *sums, void *stream);

void rmsprop(const Parameter *parameters, std::size_t count, const RMSprop &options, void *stream);

}  // namespace irlfast
