// The module irlfast._cpu takes addresses, sizes and strides. Its callers in Python own the tensors.
#include "../binding.h"
#include "cpu.h"

namespace {

using irlfast::Address, irlfast::RowsOf, irlfast::ScoringOf, irlfast::kFp32, irlfast::kUpToBf16, irlfast::pointer,
    irlfast::require, irlfast::scoring_of;

using MatrixOf = std::tuple<Address, std::string, std::int64_t, std::int64_t>;  // address, dtype, row, column
using ProductOf = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool, bool>;  // as in Product

irlfast::Matrix matrix_of(const MatrixOf &matrix, const char *name, bool some, bool narrow) {
  const auto &[address, dtype, row, column] = matrix;
  require(row >= 0 && column >= 0 && (row == 1 || column == 1),
          std::string(name) + ": found elements " + std::to_string(row) + " and " + std::to_string(column) +
              " apart, expected one of the two to be 1");
  const auto checked = irlfast::rows_of({address, dtype, row}, name, some, narrow ? kUpToBf16 : kFp32);
  return {checked.z, checked.dtype, row, column};
}

void multiply(const MatrixOf &left, const MatrixOf &right, Address out, const ProductOf &of, int threads) {
  const auto &[m, n, k, stride, narrow, add] = of;
  require(m >= 0 && n >= 0 && k >= 0, "product: found sizes " + std::to_string(m) + ", " + std::to_string(n) + ", " +
                                          std::to_string(k));
  require(stride >= n || m < 2, "out: found rows " + std::to_string(stride) + " apart, expected at least n");
  const bool some = m > 0 && n > 0;
  const auto a = matrix_of(left, "a", some && k > 0, narrow), b = matrix_of(right, "b", some && k > 0, narrow);
  auto *c = pointer<float>(out, "out", some);
  pybind11::gil_scoped_release release;
  if (some) irlfast::multiply(a, b, c, {m, n, k, stride, narrow, add}, threads);
}

void rmsprop(const std::vector<irlfast::Row> &rows, float lr, float alpha, float eps, float weight_decay,
             float momentum, float sign, int threads) {
  const auto parameters = irlfast::parameters_of(rows);
  const irlfast::RMSprop options{lr, alpha, eps, weight_decay, momentum, sign};
  pybind11::gil_scoped_release release;
  irlfast::rmsprop(parameters.data(), parameters.size(), options, threads);
}

void softmax_slopes(const RowsOf &z, Address bias, const ScoringOf &of, Address logps, Address sums, int threads) {
  const auto scoring = scoring_of(of);
  const bool some = scoring.n > 0;
  const auto rows = irlfast::rows_of(z, "z", some, kFp32);
  irlfast::require_apart(rows, scoring, "z");
  for (std::int64_t row = 0; row < scoring.n; ++row) {
    const std::int64_t target = scoring.targets[row];
    require(target >= 0 && target < scoring.vocabulary, "targets: found " + std::to_string(target));
  }
  const auto *added = pointer<const float>(bias, "bias", false);
  auto *found = pointer<float>(logps, "logps", some), *norms = pointer<float>(sums, "sums", some);
  pybind11::gil_scoped_release release;
  irlfast::softmax_slopes(static_cast<float *>(rows.z), rows.stride, added, scoring, found, norms, threads);
}

void token_logps(const RowsOf &logits, const ScoringOf &of, Address logps, Address lse, int threads) {
  const auto scoring = scoring_of(of);
  const bool some = scoring.n > 0;
  const auto rows = irlfast::rows_of(logits, "logits", some, kUpToBf16);
  auto *found = pointer<float>(logps, "logps", some), *norms = pointer<float>(lse, "lse", some);
  pybind11::gil_scoped_release release;
  irlfast::token_logps(rows, scoring, found, norms, threads);
}

void write_gradient(const RowsOf &grad, const RowsOf &logits, const ScoringOf &of, Address lse, Address upstream,
                    int threads) {
  const auto scoring = scoring_of(of);
  const bool some = scoring.n > 0;
  const auto [written, read] = irlfast::gradient_of(grad, logits, scoring, kUpToBf16);
  const auto *norms = pointer<const float>(lse, "lse", some), *above = pointer<const float>(upstream, "upstream", some);
  pybind11::gil_scoped_release release;
  irlfast::write_gradient(written, read, scoring, norms, above, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "irlfast's native code for the CPU; takes addresses, so use irlfast.optim and irlfast.ops instead.";
  if (irlfast::multiplies()) module.def("multiply", &multiply);
  module.def("rmsprop", &rmsprop);
  module.def("softmax_slopes", &softmax_slopes);
  module.def("token_logps", &token_logps);
  module.def("write_gradient", &write_gradient);
}
