// One launch for hundreds of parameters. Their table is an argument of the kernel, so it needs no device memory.
#include <algorithm>

#include "gpu.h"
#include "launch.h"
#include "vector.h"

namespace irlfast {
namespace {

constexpr int kThreads = 256;
constexpr int kShare = 8192;  // elements of a parameter that a block updates
constexpr int kMost = 400;    // parameters per launch: arguments may have 32,764 bytes

struct Table {
  Parameter parameters[kMost];
  std::int64_t first[kMost + 1];  // the first block of each parameter, and the end
  int count;
};
static_assert(sizeof(Parameter) == 64 && sizeof(Table) < 32000);

template <int width, bool centred, bool momentum, class Grad>
__device__ __forceinline__ void update(const Parameter &p, const Grad *grads, std::int64_t first, std::int64_t last,
                                       const RMSprop &options) {
  for (std::int64_t i = first + threadIdx.x * width; i < last; i += blockDim.x * width) {
    const auto grad = read<width>(grads + i);
    auto param = read<width>(p.param + i), square = read<width>(p.square + i);
    Vector<float, width> average, buffer;
    if constexpr (centred) average = read<width>(p.average + i);
    if constexpr (momentum) buffer = read<width>(p.buffer + i);
    Vector<bf16, width> copy;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      param.at[k] = updated(widen(grad.at[k]), param.at[k], &square.at[k], centred ? &average.at[k] : nullptr,
                            momentum ? &buffer.at[k] : nullptr, options);
      copy.at[k] = narrow(param.at[k]);
    }
    write(p.param + i, param);
    write(p.square + i, square);
    if constexpr (centred) write(p.average + i, average);
    if constexpr (momentum) write(p.buffer + i, buffer);
    if (p.copy) write(p.copy + i, copy);
  }
}

// Vectors of 4 elements if every tensor is aligned to their size; single elements after the last vector.
template <bool centred, bool momentum, class Grad>
__device__ void update_share(const Parameter &p, const Grad *grads, std::int64_t first, std::int64_t last,
                             const RMSprop &options) {
  const std::uintptr_t starts = address(p.param) | address(p.square) | address(p.average) | address(p.buffer) |
                                address(grads) * (16 / (4 * sizeof(Grad))) | address(p.copy) * 2;
  const std::int64_t vectors = starts % 16 ? first : first + (last - first) / 4 * 4;
  update<4, centred, momentum>(p, grads, first, vectors, options);
  update<1, centred, momentum>(p, grads, vectors, last, options);
}

template <class Grad>
__device__ void update_any(const Parameter &p, const Grad *grads, std::int64_t first, std::int64_t last,
                           const RMSprop &options) {
  if (p.average && p.buffer) return update_share<true, true>(p, grads, first, last, options);
  if (p.average) return update_share<true, false>(p, grads, first, last, options);
  if (p.buffer) return update_share<false, true>(p, grads, first, last, options);
  update_share<false, false>(p, grads, first, last, options);
}

__global__ void __launch_bounds__(kThreads)
    rmsprop_kernel(const __grid_constant__ Table table, const __grid_constant__ RMSprop options) {
  int low = 0, high = table.count;  // this block belongs to the last parameter that begins at or before it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first[middle] <= blockIdx.x ? low : high) = middle;
  }
  const Parameter &p = table.parameters[low];
  const std::int64_t first = (blockIdx.x - table.first[low]) * kShare;
  const std::int64_t last = p.n - first < kShare ? p.n : first + kShare;
  if (p.grad) return update_any(p, p.grad, first, last, options);
  update_any(p, p.grad_bf16, first, last, options);
}

}  // namespace

void rmsprop(const Parameter *parameters, std::size_t count, const RMSprop &options, void *stream) {
  for (std::size_t start = 0; start < count; start += kMost) {
    Table table{};
    table.count = static_cast<int>(std::min<std::size_t>(count - start, kMost));
    for (int k = 0; k < table.count; ++k) {
      table.parameters[k] = parameters[start + k];
      table.first[k + 1] = table.first[k] + (table.parameters[k].n + kShare - 1) / kShare;
    }
    const auto blocks = static_cast<unsigned>(table.first[table.count]);
    launch("rmsprop_kernel", rmsprop_kernel, blocks, 1, kThreads, stream, table, options);
  }
}

}  // namespace irlfast
