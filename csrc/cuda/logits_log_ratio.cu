// Log-probabilities of targets from existing logits, their gradient written over the logits, and their sums per
// sequence. The kernels are bound by memory: the forward reads every row once, the backward reads and writes it once.
#include <climits>

#include "gpu.h"
#include "launch.h"
#include "softmax.h"

namespace irlfast {
namespace {

constexpr int kRounds = 2;  // vectors that a thread of the backward takes at once

template <class T, class Logit>
__device__ void score_row(const void *z, std::int64_t offset, std::int64_t target, int vocabulary, const Logit &logit,
                          float *logp, float *lse) {
  const T *row = static_cast<const T *>(z) + offset;
  const Softmax total = over_block(scan(row, vocabulary, logit), kNothing);
  if (threadIdx.x) return;
  const float log_norm = logf(total.sum);
  *logp = picked(row, target, vocabulary, logit) - total.peak - log_norm;
  if (lse) *lse = total.peak + log_norm;
}

// Blocks (row, 0) score the policy's rows, blocks (row, 1) the reference's.
template <class Logit>
__global__ void __launch_bounds__(kThreads)
    token_logps_kernel(Rows policy, Rows reference, const std::int64_t *targets, int vocabulary, Logit logit,
                       float *logps, float *lses, float *ref_logps) {
  const Rows side = blockIdx.y ? reference : policy;
  const std::int64_t row = blockIdx.x, target = targets[row], offset = row * side.stride;
  float *logp = (blockIdx.y ? ref_logps : logps) + row, *lse = blockIdx.y ? nullptr : lses + row;
  if (target == kIgnore) {
    if (threadIdx.x == 0) *logp = 0;
    if (threadIdx.x == 0 && lse) *lse = 0;
    return;
  }
  switch (side.dtype) {
    case Dtype::fp32: return score_row<float>(side.z, offset, target, vocabulary, logit, logp, lse);
    case Dtype::bf16: return score_row<__nv_bfloat16>(side.z, offset, target, vocabulary, logit, logp, lse);
    case Dtype::fp16: return score_row<__half>(side.z, offset, target, vocabulary, logit, logp, lse);
    case Dtype::fp64: return score_row<double>(side.z, offset, target, vocabulary, logit, logp, lse);
  }
}

template <class T, int width>
struct Gradient {
  T *grad;
  const T *logits;
  std::int64_t grad_stride, stride;
  const std::int64_t *targets;
  const float *lse, *upstream;
  int vocabulary, blocks;  // blocks: per row
};

// The derivative d logp / d logits at one element, times `factor`.
template <bool capped>
__device__ __forceinline__ float slope(float z, int at, std::int64_t target, float lse, float factor,
                                       const Final<capped, false> &logit) {
  float derivative = 1;
  const float value = logit(z, at, &derivative);
  return factor * ((at == target ? 1.0f : 0.0f) - exp_fast(value - lse)) * derivative;
}

// One block per part of a row. The thread that writes an element has read it, so `grad` may be `logits`.
template <class T, int width, bool capped>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Gradient<T, width> g, Final<capped, false> logit) {
  const std::int64_t row = blockIdx.x / g.blocks, target = g.targets[row];
  const int part = static_cast<int>(blockIdx.x % g.blocks);
  const T *z = g.logits + row * g.stride;
  T *grad = g.grad + row * g.grad_stride;
  const float upstream = g.upstream[row], lse = g.lse[row], factor = upstream * logit.scale;
  const bool nothing = target == kIgnore || upstream == 0;  // a product with 0 would keep the NaN of a skipped row
  const auto write = [&](T &to, T from, int at) {
    narrow_into(to, nothing ? 0 : slope(widen(from), at, target, lse, factor, logit));
  };
  const Split s = split<T, width>(z, g.vocabulary);
  if (part == 0 && static_cast<int>(threadIdx.x) < s.edges) {
    const int at = s.edge(threadIdx.x);
    write(grad[at], z[at], at);
  }
  const auto *from = reinterpret_cast<const Vector<T, width> *>(z + s.head);
  auto *to = reinterpret_cast<Vector<T, width> *>(grad + s.head);
  const int first = part * kRounds * blockDim.x + threadIdx.x;
  Vector<T, width> mine[kRounds] = {};
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int v = first + r * blockDim.x;
    if (v < s.vectors && !nothing) mine[r] = from[v];
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int v = first + r * blockDim.x;
    if (v >= s.vectors) break;
#pragma unroll
    for (int k = 0; k < width; ++k) write(mine[r].at[k], mine[r].at[k], s.head + v * width + k);
    to[v] = mine[r];
  }
}

template <class T, int width>
void launch_gradient(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                     const float *upstream, void *stream) {
  const unsigned threads = threads_for(scoring.vocabulary);
  const std::int64_t share = static_cast<std::int64_t>(threads) * kRounds * width;
  const std::int64_t blocks = (scoring.vocabulary + share - 1) / share;
  if (scoring.n > INT_MAX / blocks) throw std::invalid_argument("logits: found more rows than a launch can take");
  const Gradient<T, width> g{static_cast<T *>(grad.z), static_cast<const T *>(logits.z), grad.stride, logits.stride,
                             scoring.targets, lse, upstream, scoring.vocabulary, static_cast<int>(blocks)};
  const unsigned all = static_cast<unsigned>(scoring.n * blocks);
  if (scoring.softcap > 0)
    launch("gradient_kernel", gradient_kernel<T, width, true>, all, 1, threads, stream, g,
           Final<true, false>{scoring.scale, scoring.softcap, nullptr});
  else
    launch("gradient_kernel", gradient_kernel<T, width, false>, all, 1, threads, stream, g,
           Final<false, false>{scoring.scale, 0, nullptr});
}

// Vectors, if every row of both tensors starts at the same distance from a multiple of 16 bytes; else elements.
template <class T>
void write_gradient_of(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                       const float *upstream, void *stream) {
  constexpr int width = 16 / sizeof(T);
  const auto apart = reinterpret_cast<std::uintptr_t>(grad.z) - reinterpret_cast<std::uintptr_t>(logits.z);
  const bool alike = apart % 16 == 0 && (grad.stride - logits.stride) % width == 0;
  (alike ? launch_gradient<T, width> : launch_gradient<T, 1>)(grad, logits, scoring, lse, upstream, stream);
}

struct Sums {
  double policy, reference;
};

__device__ __forceinline__ Sums merged(Sums a, Sums b) { return {a.policy + b.policy, a.reference + b.reference}; }
__device__ __forceinline__ Sums from_lane(Sums x, int mask) {
  return {__shfl_xor_sync(0xffffffffu, x.policy, mask), __shfl_xor_sync(0xffffffffu, x.reference, mask)};
}

// One block per sequence. Sums in fp64 lose no digit of their fp32 terms, and neither does their difference.
template <class Reference>
__global__ void __launch_bounds__(kThreads) sequence_sums_kernel(Sequences s, float *sums) {
  const int sequence = blockIdx.x, last = s.cu_seqlens[sequence + 1];
  const auto *reference = static_cast<const Reference *>(s.reference);
  Sums total{0, 0};
  for (int token = s.cu_seqlens[sequence] + threadIdx.x; token < last; token += blockDim.x) {
    total.policy += s.logps[token];
    if (s.per_token && s.targets[token] != kIgnore) total.reference += reference[token];
  }
  total = over_block(total, Sums{0, 0});
  if (threadIdx.x) return;
  if (reference && !s.per_token) total.reference = reference[sequence];
  sums[sequence] = static_cast<float>(total.policy - total.reference);
  sums[s.count + sequence] = static_cast<float>(total.policy);
  sums[2 * s.count + sequence] = static_cast<float>(total.reference);
}

template <bool capped>
void launch_token_logps(const Rows &policy, const Rows &reference, const Scoring &scoring, float *logps, float *lse,
                        float *ref_logps, void *stream) {
  using Logit = Final<capped, false>;
  launch("token_logps_kernel", token_logps_kernel<Logit>, static_cast<unsigned>(scoring.n), reference.z ? 2 : 1,
         threads_for(scoring.vocabulary), stream, policy, reference, scoring.targets, scoring.vocabulary,
         Logit{scoring.scale, scoring.softcap, nullptr}, logps, lse, ref_logps);
}

}  // namespace

void token_logps(const Rows &policy, const Rows &reference, const Scoring &scoring, float *logps, float *lse,
                 float *ref_logps, void *stream) {
  const auto run = scoring.softcap > 0 ? launch_token_logps<true> : launch_token_logps<false>;
  if (scoring.n) run(policy, reference, scoring, logps, lse, ref_logps, stream);
}

void write_gradient(const Rows &grad, const Rows &logits, const Scoring &scoring, const float *lse,
                    const float *upstream, void *stream) {
  const auto run = logits.dtype == Dtype::fp32   ? write_gradient_of<float>
                   : logits.dtype == Dtype::bf16 ? write_gradient_of<__nv_bfloat16>
                                                 : write_gradient_of<__half>;
  if (scoring.n) run(grad, logits, scoring, lse, upstream, stream);
}

void sequence_sums(const Sequences &sequences, float *sums, void *stream) {
  const auto kernel = sequences.dtype == Dtype::fp64 ? sequence_sums_kernel<double> : sequence_sums_kernel<float>;
  const unsigned blocks = static_cast<unsigned>(sequences.count);
  if (blocks) launch("sequence_sums_kernel", kernel, blocks, 1, kThreads, stream, sequences, sums);
}

}  // namespace irlfast
