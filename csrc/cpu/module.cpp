// irlfast._cpu: addresses, sizes and strides in; the callers in Python hold the tensors.
#include "../binding.h"
#include "cpu.h"

namespace {

using irlfast::Address, irlfast::RowsOf, irlfast::ScoringOf, irlfast::kUpToBf16, irlfast::pointer, irlfast::require,
    irlfast::scoring_of;

void rmsprop(const std::vector<irlfast::Row> &rows, float lr, float alpha, float eps, float weight_decay,
             float momentum, float grad_scale, int threads) {
  const auto parameters = irlfast::parameters_of(rows);
  const irlfast::RMSprop options{lr, alpha, eps, weight_decay, momentum, grad_scale};
  pybind11::gil_scoped_release release;
  irlfast::rmsprop(parameters.data(), parameters.size(), options, threads);
}

void softmax_slopes(Address z, std::int64_t n, std::int64_t vocabulary, std::int64_t stride, Address targets,
                    Address bias, float scale, float softcap, Address logps, Address sums, int threads) {
  require(n >= 0 && vocabulary > 0, "z: found [" + std::to_string(n) + ", " + std::to_string(vocabulary) + "]");
  require(stride >= vocabulary || n < 2, "z: found rows " + std::to_string(stride) + " apart, expected at least V");
  const irlfast::Logits logits{pointer<float>(z, "z", n > 0), n, vocabulary, stride,
                               pointer<const std::int64_t>(targets, "targets", n > 0),
                               pointer<const float>(bias, "bias", false), scale, softcap};
  for (std::int64_t row = 0; row < n; ++row) {
    const std::int64_t target = logits.targets[row];
    require(target >= 0 && target < vocabulary, "targets: found " + std::to_string(target));
  }
  auto *found = pointer<float>(logps, "logps", n > 0), *norms = pointer<float>(sums, "sums", n > 0);
  pybind11::gil_scoped_release release;
  irlfast::softmax_slopes(logits, found, norms, threads);
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
  module.def("rmsprop", &rmsprop);
  module.def("softmax_slopes", &softmax_slopes);
  module.def("token_logps", &token_logps);
  module.def("write_gradient", &write_gradient);
}
