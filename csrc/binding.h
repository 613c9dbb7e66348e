// What both bindings check: numbers and addresses, before anything is read through them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

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

// Each parameter as (n, param, grad, square, average, buffer, copy, whether the gradient is bf16); 0: none.
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

}  // namespace irlfast
