// The kernels of csrc/cuda on a CPU (see emulated/), on buffers that end where they must: for AddressSanitizer, UBSan.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "gpu.h"
#include "softmax.h"

namespace {

using irlfast::Dtype;

// `offset` elements from where 16 bytes are aligned, to the end of the memory.
template <class T>
struct Buffer {
  std::vector<T> memory;
  std::size_t offset;

  Buffer(std::int64_t count, T value, int offset = 0)
      : memory(static_cast<std::size_t>(offset + count), value), offset(static_cast<std::size_t>(offset)) {}
  T *get() { return memory.data() + offset; }
};

bool near(float found, double expected) { return std::fabs(found - expected) < 1e-4; }

// Equal logits: every log-probability is -log V. Row 1 is skipped, the policy its own reference, row 0 a sequence.
template <class T>
bool logits(std::int64_t n, int vocabulary, int offset, Dtype dtype, float cap) {
  T logit;
  irlfast::narrow_into(logit, 1.5f);
  const std::int64_t stride = vocabulary + offset;
  Buffer<T> z(n ? (n - 1) * stride + vocabulary : 0, logit, offset), grad(n * vocabulary, logit, offset ^ 1);
  Buffer<float> logps(n, 1), lse(n, 1), ref_logps(n, 1), upstream(n, 2), sums(6, 0);
  Buffer<std::int64_t> targets(n, 0);
  for (std::int64_t i = 0; i < n; ++i) targets.get()[i] = i == 1 ? irlfast::kIgnore : vocabulary - 1;
  const irlfast::Rows rows{z.get(), dtype, stride};
  const irlfast::Scoring scoring{n, vocabulary, targets.get(), 1, cap};
  irlfast::token_logps(rows, rows, scoring, logps.get(), lse.get(), ref_logps.get(), nullptr);
  irlfast::write_gradient({grad.get(), dtype, vocabulary}, rows, scoring, lse.get(), upstream.get(), nullptr);
  irlfast::write_gradient(rows, rows, scoring, lse.get(), upstream.get(), nullptr);
  const int first = n ? 1 : 0;
  const std::int32_t offsets[] = {0, first, static_cast<std::int32_t>(n)};
  irlfast::sequence_sums({logps.get(), targets.get(), offsets, 2, ref_logps.get(), Dtype::fp32, true}, sums.get(),
                         nullptr);
  for (std::int64_t i = 0; i < n; ++i)
    if (!near(logps.get()[i], i == 1 ? 0 : -std::log(vocabulary))) return false;
  const double rest = n > 1 ? -std::log(vocabulary) * static_cast<double>(n - 2) : 0;
  return near(sums.get()[0], 0) && near(sums.get()[2], n ? -std::log(vocabulary) : 0) && near(sums.get()[3], rest);
}

bool slopes(std::int64_t n, int vocabulary, int offset, Dtype slope, bool biased, float cap) {
  const std::int64_t stride = vocabulary + offset;
  Buffer<float> z(n ? (n - 1) * stride + vocabulary : 0, 1.5f, offset), bias(vocabulary, 0.5f), logps(n, 1);
  Buffer<std::int64_t> targets(n, 0);
  irlfast::softmax_slopes(z.get(), stride, slope, biased ? bias.get() : nullptr,
                          {n, vocabulary, targets.get(), 1, cap}, logps.get(), true, nullptr);
  for (std::int64_t i = 0; i < n; ++i)
    if (!near(logps.get()[i], -std::log(vocabulary))) return false;
  return true;
}

bool rmsprop(std::int64_t n, int offset, int form) {
  const bool centred = form & 1, momentum = form & 2, narrow = form & 4, copied = form & 8;
  Buffer<float> param(n, 1, offset), square(n, 0, offset), average(n, 0), buffer(n, 0), grad(n, 2, offset);
  Buffer<irlfast::bf16> grad_bf16(n, 0x4000), copy(n, 0);  // 2
  const irlfast::Parameter one{n, param.get(), square.get(), centred ? average.get() : nullptr,
                               momentum ? buffer.get() : nullptr, narrow ? nullptr : grad.get(),
                               narrow ? grad_bf16.get() : nullptr, copied ? copy.get() : nullptr};
  irlfast::rmsprop(&one, 1, {0.1f, 0.5f, 1e-8f, 0, 0.9f, 1}, nullptr);
  for (std::int64_t i = 0; i < n; ++i)
    if (!near(param.get()[i], 1 - 0.1 * 2 / std::sqrt(centred ? 1.0 : 2.0))) return false;
  return true;
}

}  // namespace

int main() {
  for (int vocabulary : {1, 7, 16, 33, 1000, 5001})
    for (int offset : {0, 1, 3, 4})
      for (float cap : {0.0f, 30.0f}) {
        for (std::int64_t n : {0, 1, 4}) {
          if (!logits<float>(n, vocabulary, offset, Dtype::fp32, cap)) return 1;
          if (!logits<__nv_bfloat16>(n, vocabulary, offset, Dtype::bf16, cap)) return 2;
          if (!logits<__half>(n, vocabulary, offset, Dtype::fp16, cap)) return 3;
        }
        for (Dtype slope : {Dtype::fp32, Dtype::bf16, Dtype::fp16})
          if (!slopes(2, vocabulary, offset, slope, offset & 1, cap)) return 4;
      }
  for (std::int64_t n : {0, 1, 7, 65, 9001})
    for (int offset : {0, 1})
      for (int form = 0; form < 16; ++form)
        if (!rmsprop(n, offset, form)) return 5;
  std::puts("all sizes and forms");
}
