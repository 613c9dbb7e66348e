// Matrix products on processors with AVX-512 for bf16. Operands are copied into lines of 16 rows or columns, a block at a
// time, so that the innermost loop reads caches only.
#include "cpu.h"

#if defined(__x86_64__) && __GNUC__ >= 11 && !defined(__clang__)  // GCC 11 knows the instructions

#include <immintrin.h>

#include <algorithm>
#include <memory>

#include "parallel.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")

namespace irlfast {
namespace {

constexpr int kWidth = 16;         // lanes: words of a line
constexpr int kRows = 8;           // a tile of results is so many rows
constexpr int kGroups = 3;         // by so many lines: 24 registers of sums
constexpr std::int64_t kK = 256;   // lines of a block
constexpr std::int64_t kM = 256;   // rows of a block of a: 256 KiB, which the second-level cache holds
constexpr std::int64_t kN = 768;   // columns of a block of b

// A word is one fp32 number, or two bf16 numbers that follow each other along k.
struct alignas(64) Line {
  std::uint32_t words[kWidth];
};

template <bool narrow>
constexpr std::int64_t kPerWord = narrow ? 2 : 1;

__mmask16 first(std::int64_t count) { return static_cast<__mmask16>((1u << std::clamp<std::int64_t>(count, 0, 16)) - 1); }

__m512i halves(const bf16 *x, __mmask16 lanes) {
  return _mm512_maskz_cvtepu16_epi32(lanes, _mm256_maskz_loadu_epi16(lanes, x));
}

__m512i halves(const float *x, __mmask16 lanes) {
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, x));
  return _mm512_maskz_cvtepu16_epi32(lanes, reinterpret_cast<__m256i>(rounded));
}

// The words of 16 lanes at one place along k. Elements of lanes follow each other in memory, those along k are `next`
// apart, and `count` of them are left.
template <bool narrow, class T>
__m512i across(const T *x, std::int64_t next, std::int64_t count, __mmask16 lanes) {
  if constexpr (narrow) {
    const __m512i low = halves(x, lanes), high = count > 1 ? halves(x + next, lanes) : _mm512_setzero_si512();
    return _mm512_or_si512(low, _mm512_maskz_slli_epi32(lanes, high, 16));
  } else {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes, x));
  }
}

// 16 words of one lane, whose elements along k follow each other in memory; `count` of them are left.
__m512i along(const bf16 *x, std::int64_t count) {
  const std::uint64_t bits = (std::uint64_t{1} << std::clamp<std::int64_t>(count, 0, 32)) - 1;
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits), x);
}

template <bool narrow>
__m512i along(const float *x, std::int64_t count) {
  const __m512 low = _mm512_maskz_loadu_ps(first(count), x);
  if constexpr (!narrow) return _mm512_castps_si512(low);
  const __m512 high = _mm512_maskz_loadu_ps(first(count - kWidth), x + kWidth);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Transposes 16 lines: each step exchanges one bit of the line's number and of the lane's.
template <int bit>
void exchange(__m512i (&lines)[kWidth]) {
  using Lanes = int __attribute__((vector_size(64)));
  const Lanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto from_low = reinterpret_cast<__m512i>((lane & bit) != 0 ? lane - bit + kWidth : lane);
  const auto from_high = reinterpret_cast<__m512i>((lane & bit) != 0 ? lane + kWidth : lane + bit);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & bit) continue;
    const __m512i low = lines[i], high = lines[i | bit];
    lines[i] = _mm512_permutex2var_epi32(low, from_low, high);
    lines[i | bit] = _mm512_permutex2var_epi32(low, from_high, high);
  }
}

// Copies `lanes` by `count` elements along k into groups of 16 lanes, each of `lines` lines. What is missing is 0.
template <bool narrow, class T>
void pack(const T *x, std::int64_t lane, std::int64_t next, std::int64_t lanes, std::int64_t count, Line *to) {
  constexpr std::int64_t step = kPerWord<narrow>;
  const std::int64_t lines = (count + step - 1) / step;
  for (std::int64_t begin = 0; begin < lanes; begin += kWidth, to += lines) {
    const T *group = x + begin * lane;
    if (lane == 1) {
      for (std::int64_t k = 0; k < lines; ++k)
        _mm512_store_si512(to + k, across<narrow>(group + k * step * next, next, count - k * step, first(lanes - begin)));
      continue;
    }
    for (std::int64_t k = 0; k < lines; k += kWidth) {
      __m512i block[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const std::int64_t left = begin + i < lanes ? count - k * step : 0;
        const T *row = left ? group + i * lane + k * step : x;
        if constexpr (sizeof(T) == sizeof(bf16)) block[i] = along(row, left);
        if constexpr (sizeof(T) == sizeof(float)) block[i] = along<narrow>(row, left);
      }
      exchange<1>(block), exchange<2>(block), exchange<4>(block), exchange<8>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        if (k + i < lines) _mm512_store_si512(to + k + i, block[i]);
    }
  }
}

template <bool narrow>
void pack(const Matrix &x, std::int64_t lane, std::int64_t next, std::int64_t lanes, std::int64_t count, Line *to) {
  if (x.dtype == Dtype::fp32) return pack<narrow>(static_cast<const float *>(x.data), lane, next, lanes, count, to);
  if constexpr (narrow) pack<narrow>(static_cast<const bf16 *>(x.data), lane, next, lanes, count, to);
}

template <bool narrow>
__m512 product_and_sum(std::uint32_t a, __m512i b, __m512 sum) {
  const __m512i all = _mm512_set1_epi32(static_cast<int>(a));
  if constexpr (narrow)
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(all), reinterpret_cast<__m512bh>(b));
  else
    return _mm512_fmadd_ps(_mm512_castsi512_ps(all), _mm512_castsi512_ps(b), sum);
}

// A tile of results: 8 rows by `groups` lines, of which `rows` and `columns` exist.
template <bool narrow, int groups>
void tile(const std::uint32_t *a, const Line *b, std::int64_t lines, float *c, std::int64_t stride, std::int64_t rows,
          std::int64_t columns, bool add) {
  for (int i = 0; i < kRows; ++i)  // the results are wanted in a few thousand cycles
    for (int g = 0; g < groups; ++g) __builtin_prefetch(c + std::min<std::int64_t>(i, rows - 1) * stride + g * kWidth, 1);
  __m512 sums[kRows][groups] = {};
  for (std::int64_t k = 0; k < lines; ++k) {
    __m512i line[groups];
#pragma GCC unroll 3
    for (int g = 0; g < groups; ++g) line[g] = _mm512_load_si512(b + g * lines + k);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int g = 0; g < groups; ++g) sums[i][g] = product_and_sum<narrow>(a[k * kWidth + i], line[g], sums[i][g]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int g = 0; g < groups; ++g) {
      float *to = c + i * stride + g * kWidth;
      const __mmask16 lanes = first(columns - g * kWidth);
      if (add) sums[i][g] = _mm512_add_ps(sums[i][g], _mm512_maskz_loadu_ps(lanes, to));
      _mm512_mask_storeu_ps(to, lanes, sums[i][g]);
    }
  }
}

template <bool narrow>
void block(const Line *a, const Line *b, std::int64_t lines, float *c, std::int64_t stride, std::int64_t m,
           std::int64_t n, bool add) {
  for (std::int64_t j = 0; j < n; j += kGroups * kWidth) {
    const Line *columns = b + j / kWidth * lines;
    for (std::int64_t i = 0; i < m; i += kRows) {
      const std::uint32_t *rows = a[i / kWidth * lines].words + i % kWidth;
      float *to = c + i * stride + j;
      if (n - j > 2 * kWidth) tile<narrow, 3>(rows, columns, lines, to, stride, m - i, n - j, add);
      else if (n - j > kWidth) tile<narrow, 2>(rows, columns, lines, to, stride, m - i, n - j, add);
      else tile<narrow, 1>(rows, columns, lines, to, stride, m - i, n - j, add);
    }
  }
}

Matrix part(const Matrix &x, std::int64_t row, std::int64_t column) {
  const std::int64_t offset = (row * x.row + column * x.column) * (x.dtype == Dtype::fp32 ? 4 : 2);
  return {static_cast<const char *>(x.data) + offset, x.dtype, x.row, x.column};
}

template <bool narrow>
void share(const Matrix &a, const Matrix &b, const Product &p, float *c) {
  constexpr std::int64_t depth = kK * kPerWord<narrow>;
  const std::unique_ptr<Line[]> rows(new Line[kM / kWidth * kK]), columns(new Line[kN / kWidth * kK]);
  for (std::int64_t j = 0; j < p.n; j += kN) {
    std::int64_t k = 0;
    do {  // once where p.k is 0: the results are 0
      const std::int64_t n = std::min(p.n - j, kN), count = std::min(p.k - k, depth);
      const std::int64_t lines = (count + kPerWord<narrow> - 1) / kPerWord<narrow>;
      pack<narrow>(part(b, k, j), b.column, b.row, n, count, columns.get());
      for (std::int64_t i = 0; i < p.m; i += kM) {
        const std::int64_t m = std::min(p.m - i, kM);
        pack<narrow>(part(a, i, k), a.row, a.column, m, count, rows.get());
        block<narrow>(rows.get(), columns.get(), lines, c + i * p.stride + j, p.stride, m, n, p.add || k > 0);
      }
    } while ((k += depth) < p.k);
  }
}

}  // namespace

bool multiplies() { return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel"); }

void multiply(const Matrix &a, const Matrix &b, float *c, const Product &product, int threads) {
  const bool by_rows = product.m > product.n;
  const std::int64_t longer = by_rows ? product.m : product.n, other = by_rows ? product.n : product.m;
  const std::int64_t least = (1 << 22) / (other * std::max<std::int64_t>(product.k, 1) * kWidth + 1) + 1;
  parallel((longer + kWidth - 1) / kWidth, least, threads, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t begin = first * kWidth, size = std::min(last * kWidth, longer) - begin;
    Product own = product;
    (by_rows ? own.m : own.n) = size;
    const Matrix rows = by_rows ? part(a, begin, 0) : a, columns = by_rows ? b : part(b, 0, begin);
    float *to = c + begin * (by_rows ? product.stride : 1);
    if (product.narrow) share<true>(rows, columns, own, to);
    else share<false>(rows, columns, own, to);
  });
}

}  // namespace irlfast

#pragma GCC pop_options
#else

namespace irlfast {

bool multiplies() { return false; }
void multiply(const Matrix &, const Matrix &, float *, const Product &, int) {}

}  // namespace irlfast

#endif
