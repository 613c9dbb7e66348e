// irlfast._cuda: device addresses, sizes, strides and a stream in; the callers in Python hold the tensors.
#include <climits>

#include "../binding.h"
#include "gpu.h"

#ifndef IRLFAST_DEVICE
#define IRLFAST_DEVICE "cuda"  // the tests also compile the kernels for the CPU, and run them there
#endif

namespace {

using irlfast::Address, irlfast::Dtype, irlfast::pointer, irlfast::require;

using RowsOf = std::tuple<Address, std::string, std::int64_t>;  // address, dtype, elements from row to row
using ScoringOf = std::tuple<std::int64_t, std::int64_t, Address, float, float>;  // n, V, targets, scale, soft-cap or 0

void *stream_of(Address stream) { return reinterpret_cast<void *>(stream); }

Dtype dtype_of(const std::string &name, const char *of, bool double_too) {
  const char *names[] = {"float32", "bfloat16", "float16", "float64"};
  const Dtype dtypes[] = {Dtype::fp32, Dtype::bf16, Dtype::fp16, Dtype::fp64};
  for (int k = 0; k < (double_too ? 4 : 3); ++k)
    if (name == names[k]) return dtypes[k];
  throw std::invalid_argument(std::string(of) + ": found dtype " + name + ", expected float32, bfloat16 or float16" +
                              (double_too ? " or float64" : ""));
}

irlfast::Rows rows_of(const RowsOf &rows, const char *name, bool needed, bool double_too = false) {
  const auto &[address, dtype, stride] = rows;
  require(stride >= 0, std::string(name) + ": found rows " + std::to_string(stride) + " apart");
  const Dtype kind = dtype_of(dtype, name, double_too);
  if (kind == Dtype::fp64) return {pointer<double>(address, name, needed), kind, stride};
  if (kind == Dtype::fp32) return {pointer<float>(address, name, needed), kind, stride};
  return {pointer<std::uint16_t>(address, name, needed), kind, stride};
}

irlfast::Scoring scoring_of(const ScoringOf &scoring) {
  const auto &[n, vocabulary, targets, scale, softcap] = scoring;
  const bool fits = n >= 0 && n <= INT_MAX && vocabulary > 0 && vocabulary <= INT_MAX / 2;
  require(fits, "logits: found [" + std::to_string(n) + ", " + std::to_string(vocabulary) + "]");
  return {n, static_cast<int>(vocabulary), pointer<const std::int64_t>(targets, "targets", n > 0), scale, softcap};
}

void token_logps(const RowsOf &logits, const RowsOf &ref_logits, const ScoringOf &of, Address logps, Address lse,
                 Address ref_logps, Address stream) {
  const auto scoring = scoring_of(of);
  const bool some = scoring.n > 0;
  const auto policy = rows_of(logits, "logits", some);
  const auto reference = rows_of(ref_logits, "ref_logits", false, true);
  irlfast::token_logps(policy, reference, scoring, pointer<float>(logps, "logps", some),
                       pointer<float>(lse, "lse", some),
                       pointer<float>(ref_logps, "ref_logps", some && reference.z), stream_of(stream));
}

void write_gradient(const RowsOf &grad, const RowsOf &logits, const ScoringOf &of, Address lse, Address upstream,
                    Address stream) {
  const auto scoring = scoring_of(of);
  const bool some = scoring.n > 0;
  const auto written = rows_of(grad, "grad", some), read = rows_of(logits, "logits", some);
  require(written.dtype == read.dtype, "grad: found another dtype than that of logits");
  require(written.stride >= scoring.vocabulary || scoring.n < 2,
          "grad: found rows " + std::to_string(written.stride) + " apart, expected at least V");
  irlfast::write_gradient(written, read, scoring, pointer<const float>(lse, "lse", some),
                          pointer<const float>(upstream, "upstream", some), stream_of(stream));
}

void softmax_slopes(const RowsOf &z, const std::string &dtype, Address bias, const ScoringOf &of, Address logps,
                    Address stream) {
  const auto scoring = scoring_of(of);
  const auto rows = rows_of(z, "z", scoring.n > 0);
  require(rows.dtype == Dtype::fp32, "z: found dtype " + std::get<1>(z) + ", expected float32");
  require(rows.stride >= scoring.vocabulary || scoring.n < 2,
          "z: found rows " + std::to_string(rows.stride) + " apart, expected at least V");
  irlfast::softmax_slopes(static_cast<float *>(rows.z), rows.stride, dtype_of(dtype, "slope", false),
                          pointer<const float>(bias, "bias", false), scoring,
                          pointer<float>(logps, "logps", scoring.n > 0), stream_of(stream));
}

void sequence_sums(Address logps, Address targets, Address cu_seqlens, std::int64_t sequences, Address ref_logps,
                   const std::string &dtype, bool per_token, Address sums, Address stream) {
  require(sequences >= 0 && sequences <= INT_MAX / 3, "sequences: found " + std::to_string(sequences));
  const bool wide = dtype == "float64";
  require(wide || dtype == "float32", "ref_logps: found dtype " + dtype + ", expected float32 or float64");
  const void *reference = wide ? static_cast<const void *>(pointer<const double>(ref_logps, "ref_logps", false))
                               : pointer<const float>(ref_logps, "ref_logps", false);
  const irlfast::Sequences all{pointer<const float>(logps, "logps", false),
                               pointer<const std::int64_t>(targets, "targets", false),
                               pointer<const std::int32_t>(cu_seqlens, "cu_seqlens", sequences > 0),
                               static_cast<int>(sequences),
                               reference,
                               wide ? Dtype::fp64 : Dtype::fp32,
                               per_token};
  irlfast::sequence_sums(all, pointer<float>(sums, "sums", sequences > 0), stream_of(stream));
}

void rmsprop(const std::vector<irlfast::Row> &rows, float lr, float alpha, float eps, float weight_decay,
             float momentum, float grad_scale, Address stream) {
  const auto parameters = irlfast::parameters_of(rows);
  const irlfast::RMSprop options{lr, alpha, eps, weight_decay, momentum, grad_scale};
  irlfast::rmsprop(parameters.data(), parameters.size(), options, stream_of(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "irlfast's kernels in CUDA C++; takes addresses, so use irlfast.optim and irlfast.ops instead.";
  module.attr("device") = IRLFAST_DEVICE;  // where the addresses are
  module.def("token_logps", &token_logps);
  module.def("write_gradient", &write_gradient);
  module.def("softmax_slopes", &softmax_slopes);
  module.def("sequence_sums", &sequence_sums);
  module.def("rmsprop", &rmsprop);
}
