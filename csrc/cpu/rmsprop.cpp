// One pass over every parameter: gradient, state and parameter are read once and written once.
#include "cpu.h"
#include "parallel.h"

namespace irlfast {
namespace {

template <bool centred, bool momentum, bool copied, class Grad>
IRLFAST_INLINE void update(const Parameter &p, const Grad *grads, std::int64_t first, std::int64_t last,
                           const RMSprop &o) {
  float *__restrict__ param = p.param, *__restrict__ square = p.square;
  float *__restrict__ average = p.average, *__restrict__ buffer = p.buffer;
  const Grad *__restrict__ grad = grads;
  bf16 *__restrict__ copy = p.copy;
#pragma omp simd
  for (std::int64_t i = first; i < last; ++i) {
    const float value = updated(widen(grad[i]), param[i], square + i, centred ? average + i : nullptr,
                                momentum ? buffer + i : nullptr, o);
    param[i] = value;
    if constexpr (copied) copy[i] = narrow(value);
  }
}

template <bool centred, bool momentum>
IRLFAST_INLINE void choose(const Parameter &p, std::int64_t first, std::int64_t last, const RMSprop &o) {
  if (p.grad && p.copy) update<centred, momentum, true>(p, p.grad, first, last, o);
  if (p.grad && !p.copy) update<centred, momentum, false>(p, p.grad, first, last, o);
  if (!p.grad && p.copy) update<centred, momentum, true>(p, p.grad_bf16, first, last, o);
  if (!p.grad && !p.copy) update<centred, momentum, false>(p, p.grad_bf16, first, last, o);
}

IRLFAST_CLONES void update_any(const Parameter &p, std::int64_t first, std::int64_t last, const RMSprop &o) {
  if (p.average && p.buffer) choose<true, true>(p, first, last, o);
  if (p.average && !p.buffer) choose<true, false>(p, first, last, o);
  if (!p.average && p.buffer) choose<false, true>(p, first, last, o);
  if (!p.average && !p.buffer) choose<false, false>(p, first, last, o);
}

constexpr std::int64_t kLeast = 1 << 16;  // the least elements per thread

}  // namespace

void rmsprop(const Parameter *parameters, std::size_t count, const RMSprop &options, int threads) {
  std::int64_t total = 0;
  for (std::size_t k = 0; k < count; ++k) total += parameters[k].n;
  parallel(total, kLeast, threads, [&](std::int64_t first, std::int64_t last) {
    std::int64_t offset = 0;  // of parameter k among all elements
    for (std::size_t k = 0; k < count; offset += parameters[k++].n) {
      const std::int64_t begin = std::max(first - offset, std::int64_t{0});
      const std::int64_t end = std::min(last - offset, parameters[k].n);
      if (begin < end) update_any(parameters[k], begin, end, options);
    }
  });
}

}  // namespace irlfast
