// Every size, form and number of threads, on buffers that end where they must: for the sanitizers of memory, behaviour and threads.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <memory>

#include "cpu.h"

namespace {

template <class T>
std::unique_ptr<T[]> filled(std::int64_t count, T value) {
  auto buffer = std::make_unique<T[]>(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) buffer[static_cast<std::size_t>(i)] = value;
  return buffer;
}

bool rmsprop(std::int64_t n, bool centred, bool momentum, bool narrow, bool copied, int threads) {
  auto param = filled<float>(n, 1), square = filled<float>(n, 0), average = filled<float>(n, 0);
  auto buffer = filled<float>(n, 0), grad = filled<float>(n, 2);
  auto grad_bf16 = filled<irlfast::bf16>(n, 0x4000), copy = filled<irlfast::bf16>(n, 0);  // 2
  const irlfast::Parameter parameters[] = {{n, param.get(), square.get(), centred ? average.get() : nullptr,
                                            momentum ? buffer.get() : nullptr, narrow ? nullptr : grad.get(),
                                            narrow ? grad_bf16.get() : nullptr, copied ? copy.get() : nullptr}};
  irlfast::rmsprop(parameters, 1, {0.1f, 0.5f, 1e-8f, 0, 0.9f, 1}, threads);
  // g = 2: square = 2, average = 1, variance 2 or 1, step sqrt(2) or 2.
  const float expected = 1 - 0.1f * 2 / std::sqrt(centred ? 1.0f : 2.0f);
  for (std::int64_t i = 0; i < n; ++i)
    if (std::fabs(param[static_cast<std::size_t>(i)] - expected) > 1e-6f) return false;
  return true;
}

bool softmax(std::int64_t n, std::int64_t vocabulary, std::int64_t stride, bool biased, float cap, int threads) {
  auto z = filled<float>(n ? (n - 1) * stride + vocabulary : 0, 1.5f), bias = filled<float>(vocabulary, 0.5f);
  auto logps = filled<float>(n, 0), sums = filled<float>(n, 0);
  auto targets = filled<std::int64_t>(n, vocabulary - 1);
  const irlfast::Scoring scoring{n, static_cast<int>(vocabulary), targets.get(), 1, cap};
  irlfast::softmax_slopes(z.get(), stride, biased ? bias.get() : nullptr, scoring, logps.get(), sums.get(), threads);
  for (std::int64_t i = 0; i < n; ++i)
    if (std::fabs(logps[static_cast<std::size_t>(i)] + std::log(static_cast<float>(vocabulary))) > 1e-4f) return false;
  return true;
}

template <class A, class B>
bool product(std::int64_t m, std::int64_t n, std::int64_t k, int form, int threads) {
  const bool add = form & 1, left = form & 2, right = form & 4;  // whether the columns of a, of b follow each other
  A half;
  B two;
  irlfast::narrow_into(half, 0.5f);
  irlfast::narrow_into(two, 2);
  const auto a = filled<A>(m * k, half);
  const auto b = filled<B>(k * n, two);
  const std::int64_t stride = n + 3;
  auto c = filled<float>(m ? (m - 1) * stride + n : 0, 1);
  const auto matrix = [](const auto *x, std::int64_t rows, std::int64_t columns, bool along) {
    const auto dtype = sizeof(*x) == sizeof(float) ? irlfast::Dtype::fp32 : irlfast::Dtype::bf16;
    return irlfast::Matrix{x, dtype, along ? 1 : columns, along ? rows : 1};
  };
  const bool narrow = sizeof(A) + sizeof(B) < 2 * sizeof(float) || form & 8;
  irlfast::multiply(matrix(a.get(), m, k, left), matrix(b.get(), k, n, right), c.get(), {m, n, k, stride, narrow, add},
                    threads);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < stride && i * stride + j < (m - 1) * stride + n; ++j)
      if (c[static_cast<std::size_t>(i * stride + j)] != static_cast<float>(j < n ? k + add : 1)) return false;
  return true;
}

template <class T>
bool logits(std::int64_t n, std::int64_t vocabulary, std::int64_t stride, irlfast::Dtype dtype, float cap,
            int threads) {
  T one;
  irlfast::narrow_into(one, 1.5f);
  auto z = filled<T>(n ? (n - 1) * stride + vocabulary : 0, one);
  auto logps = filled<float>(n, 1), lse = filled<float>(n, 1), upstream = filled<float>(n, 2);
  auto targets = filled<std::int64_t>(n, vocabulary - 1);
  if (n > 1) targets[1] = irlfast::kIgnore;
  const irlfast::Rows rows{z.get(), dtype, stride};
  const irlfast::Scoring scoring{n, static_cast<int>(vocabulary), targets.get(), 1, cap};
  irlfast::token_logps(rows, scoring, logps.get(), lse.get(), threads);
  irlfast::write_gradient(rows, rows, scoring, lse.get(), upstream.get(), threads);
  for (std::int64_t i = 0; i < n; ++i) {
    const float expected = i == 1 ? 0 : -std::log(static_cast<float>(vocabulary));
    if (std::fabs(logps[static_cast<std::size_t>(i)] - expected) > 1e-4f) return false;
    double sum = 0;  // of a softmax minus a one
    for (std::int64_t k = 0; k < vocabulary; ++k) sum += irlfast::widen(z[static_cast<std::size_t>(i * stride + k)]);
    if (std::fabs(sum) > 2e-2) return false;
  }
  return true;
}

}  // namespace

int main() {
  for (std::int64_t n : {0, 1, 7, 65, 200000})
    for (int form = 0; form < 16; ++form)
      for (int threads : {1, 3})
        if (!rmsprop(n, form & 1, form & 2, form & 4, form & 8, threads)) return 1;
  for (std::int64_t n : {0, 1, 5})
    for (std::int64_t vocabulary : {1, 7, 1000, 20001})
      for (int form = 0; form < 4; ++form)
        for (int threads : {1, 3})
          if (!softmax(n, vocabulary, vocabulary + 3, form & 1, form & 2 ? 30.0f : 0.0f, threads)) return 2;
  for (std::int64_t n : {0, 1, 5})
    for (std::int64_t vocabulary : {1, 7, 1000, 20001})
      for (float cap : {0.0f, 30.0f})
        for (int threads : {1, 3}) {
          if (!logits<float>(n, vocabulary, vocabulary + 3, irlfast::Dtype::fp32, cap, threads)) return 3;
          if (!logits<irlfast::bf16>(n, vocabulary, vocabulary + 3, irlfast::Dtype::bf16, cap, threads)) return 4;
        }
  for (std::int64_t m : {1, 8, 17, 300})
    for (std::int64_t n : {1, 16, 49, 800})
      for (std::int64_t k : {0, 1, 16, 33, 600})
        for (int form = 0; form < 16 && irlfast::multiplies(); ++form) {
          const int threads = 1 + form % 3;
          if (!product<float, float>(m, n, k, form, threads)) return 5;
          if (!product<float, irlfast::bf16>(m, n, k, form, threads)) return 6;
          if (!product<irlfast::bf16, irlfast::bf16>(m, n, k, form, threads)) return 7;
        }
  std::puts("all sizes and forms");
}
