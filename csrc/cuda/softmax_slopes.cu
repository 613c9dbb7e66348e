// The middle step of the pair slab: log-probabilities and, if asked, their derivatives. A row is read once. For the
// derivatives it is read again (from the L2 cache, if the rows in flight fit) and overwritten.
#include "gpu.h"
#include "launch.h"
#include "softmax.h"

namespace irlfast {
namespace {

// `to` has narrower numbers in the memory of `from`. All threads loop together: in each round, all reads come before
// all writes.
template <int width, class T, class Logit>
__device__ void write_slopes(const float *from, T *to, int first, int last, std::int64_t target, Softmax total,
                             const Logit &logit) {
  for (int start = first; start < last; start += blockDim.x * width) {
    const int at = start + threadIdx.x * width;
    Vector<float, width> values{};
    if (at < last) values = read<width>(from + at);
    __syncthreads();
    Vector<T, width> slopes;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      float derivative = 1;
      const float power = exp_fast(logit(values.at[k], min(at + k, last - 1), &derivative) - total.peak);
      narrow_into(slopes.at[k], (at + k == target ? total.sum - power : -power) / total.sum * derivative);
    }
    if (at < last) write(to + at, slopes);
  }
}

// One block per row.
template <class T, class Logit>
__global__ void __launch_bounds__(kThreads)
    softmax_slopes_kernel(float *z, std::int64_t stride, const std::int64_t *targets, int vocabulary, Logit logit,
                          float *logps, bool slopes) {
  const std::int64_t row = blockIdx.x, target = targets[row];
  float *from = z + row * stride;
  T *to = reinterpret_cast<T *>(from);
  const Softmax total = over_block(scan(from, vocabulary, logit), kNothing);
  if (threadIdx.x == 0) logps[row] = picked(from, target, vocabulary, logit) - total.peak - logf(total.sum);
  if (!slopes) return;
  const int vectors = address(from) % 16 ? 0 : vocabulary / 4 * 4;
  write_slopes<4>(from, to, 0, vectors, target, total, logit);
  write_slopes<1>(from, to, vectors, vocabulary, target, total, logit);
}

template <class T, bool capped, bool biased>
void launch_softmax_slopes(float *z, std::int64_t stride, const float *bias, const Scoring &scoring, float *logps,
                           bool slopes, void *stream) {
  using Logit = Final<capped, biased>;
  launch("softmax_slopes_kernel", softmax_slopes_kernel<T, Logit>, static_cast<unsigned>(scoring.n), 1,
         threads_for(scoring.vocabulary), stream, z, stride, scoring.targets, scoring.vocabulary,
         Logit{scoring.scale, scoring.softcap, bias}, logps, slopes);
}

template <class T>
void softmax_slopes_of(float *z, std::int64_t stride, const float *bias, const Scoring &scoring, float *logps,
                       bool slopes, void *stream) {
  const bool capped = scoring.softcap > 0;
  const auto run = capped ? bias ? launch_softmax_slopes<T, true, true> : launch_softmax_slopes<T, true, false>
                   : bias ? launch_softmax_slopes<T, false, true>
                          : launch_softmax_slopes<T, false, false>;
  run(z, stride, bias, scoring, logps, slopes, stream);
}

}  // namespace

void softmax_slopes(float *z, std::int64_t stride, Dtype slope, const float *bias, const Scoring &scoring, float *logps,
                    bool slopes, void *stream) {
  const auto run = slope == Dtype::fp32   ? softmax_slopes_of<float>
                   : slope == Dtype::bf16 ? softmax_slopes_of<__nv_bfloat16>
                                          : softmax_slopes_of<__half>;
  if (scoring.n) run(z, stride, bias, scoring, logps, slopes, stream);
}

}  // namespace irlfast
