// Checks that both bindings share: numbers and addresses are checked before any access.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "logits.h"
#include "rmsprop.h"

namespace irlfast {

using Address = std::uintptr_t;

inline void require(bool holds, const std::string &what) {
  if (!holds) throw std::invalid_argument(what);  // in Python a ValueError
}

template <class T>
T *pointer(Address address, const char *name, bool needed) {
  require(address != 0 || !needed, std::string(name) + ": found a null pointer");
  require(address % alignof(T) == 0, std::string(name) + ": found an address that is not aligned to its elements");
  return reinterpret_cast<T *>(address);
}

// A parameter is (n, param, grad, square, average, buffer, copy, whether the gradient is bf16); 0 stands for none.
using Row = std::tuple<std::int64_t, Address, Address, Address, Address, Address, Address, bool>;

inline std::vector<Parameter> parameters_of(const std::vector<Row> &rows) {
  std::vector<Parameter> parameters;
  parameters.reserve(rows.size());
  for (const auto &[n, param, grad, square, average, buffer, copy, narrow] : rows) {
    require(n >= 0, "n: found " + std::to_string(n) + ", expected a number >= 0");
    if (n == 0) continue;
    parameters.push_back({n, pointer<float>(param, "param", true), pointer<float>(square, "square", true),
                          pointer<float>(average, "average", false), pointer<float>(buffer, "buffer", false),
                          narrow ? nullptr : pointer<const float>(grad, "grad", true),
                          narrow ? pointer<const bf16>(grad, "grad", true) : nullptr,
                          pointer<bf16>(copy, "copy", false)});
  }
  return parameters;
}

using RowsOf = std::tuple<Address, std::string, std::int64_t>;  // address, dtype, elements from row to row
using ScoringOf = std::tuple<std::int64_t, std::int64_t, Address, float, float>;  // n, V, targets, scale, soft-cap or 0

// The dtypes that a function takes: the first so many of float32, bfloat16, float16, float64.
enum Kinds { kFp32 = 1, kUpToBf16 = 2, kUpToFp16 = 3, kUpToFp64 = 4 };

inline Dtype dtype_of(const std::string &name, const char *of, Kinds kinds) {
  const char *names[] = {"float32", "bfloat16", "float16", "float64"};
  const Dtype dtypes[] = {Dtype::fp32, Dtype::bf16, Dtype::fp16, Dtype::fp64};
  std::string expected = names[0];
  for (int k = 0; k < kinds; ++k) {
    if (name == names[k]) return dtypes[k];
    if (k) expected += (k + 1 == kinds ? " or " : ", ") + std::string(names[k]);
  }
  throw std::invalid_argument(std::string(of) + ": found dtype " + name + ", expected " + expected);
}

inline Rows rows_of(const RowsOf &rows, const char *name, bool needed, Kinds kinds) {
  const auto &[address, dtype, stride] = rows;
  require(stride >= 0, std::string(name) + ": found rows " + std::to_string(stride) + " apart");
  const Dtype kind = dtype_of(dtype, name, kinds);
  if (kind == Dtype::fp64) return {pointer<double>(address, name, needed), kind, stride};
  if (kind == Dtype::fp32) return {pointer<float>(address, name, needed), kind, stride};
  return {pointer<std::uint16_t>(address, name, needed), kind, stride};
}

inline Scoring scoring_of(const ScoringOf &scoring) {
  const auto &[n, vocabulary, targets, scale, softcap] = scoring;
  const bool fits = n >= 0 && n <= INT_MAX && vocabulary > 0 && vocabulary <= INT_MAX / 2;
  require(fits, "logits: found [" + std::to_string(n) + ", " + std::to_string(vocabulary) + "]");
  return {n, static_cast<int>(vocabulary), pointer<const std::int64_t>(targets, "targets", n > 0), scale, softcap};
}

inline void require_apart(const Rows &rows, const Scoring &scoring, const char *name) {
  require(rows.stride >= scoring.vocabulary || scoring.n < 2,
          std::string(name) + ": found rows " + std::to_string(rows.stride) + " apart, expected at least V");
}

// Rows of a gradient to write, and of the logits that it is computed from.
inline std::pair<Rows, Rows> gradient_of(const RowsOf &grad, const RowsOf &logits, const Scoring &scoring, Kinds kinds) {
  const bool some = scoring.n > 0;
  const auto written = rows_of(grad, "grad", some, kinds), read = rows_of(logits, "logits", some, kinds);
  require(written.dtype == read.dtype, "grad: found another dtype than that of logits");
  require_apart(written, scoring, "grad");
  return {written, read};
}

}  // namespace irlfast
