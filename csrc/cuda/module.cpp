// The module irlfast._cuda takes device addresses, sizes, strides and a stream. Its callers in Python own the tensors.
#include <climits>

#include "../binding.h"
#include "gpu.h"

#ifndef IRLFAST_DEVICE
#define IRLFAST_DEVICE "cuda"  // tests compile the kernels for the CPU too
#endif

namespace {

using irlfast::Address, irlfast::Dtype, irlfast::RowsOf, irlfast::ScoringOf, irlfast::dtype_of, irlfast::kFp32,
    irlfast::kUpToFp16, irlfast::kUpToFp64, irlfast::pointer, irlfast::require, irlfast::require_apart, irlfast::rows_of,
    irlfast::scoring_of;

void *stream_of(Address stream) { return reinterpret_cast<void *>(stream); }

void token_logps(const RowsOf &logits, const RowsOf &ref_logits, const ScoringOf &of, Address logps, Address lse,
                 Address ref_logps, Address stream) {
  const auto scoring = scoring_of(of);
  const bool some = scoring.n > 0;
  const auto policy = rows_of(logits, "logits", some, kUpToFp16);
  const auto reference = rows_of(ref_logits, "ref_logits", false, kUpToFp64);
  irlfast::token_logps(policy, reference, scoring, pointer<float>(logps, "logps", some),
                       pointer<float>(lse, "lse", some),
                       pointer<float>(ref_logps, "ref_logps", some && reference.z), stream_of(stream));
}

void write_gradient(const RowsOf &grad, const RowsOf &logits, const ScoringOf &of, Address lse, Address upstream,
                    Address stream) {
  const auto scoring = scoring_of(of);
  const bool some = scoring.n > 0;
  const auto [written, read] = irlfast::gradient_of(grad, logits, scoring, kUpToFp16);
  irlfast::write_gradient(written, read, scoring, pointer<const float>(lse, "lse", some),
                          pointer<const float>(upstream, "upstream", some), stream_of(stream));
}

void softmax_slopes(const RowsOf &z, const std::string &dtype, Address bias, const ScoringOf &of, Address logps,
                    bool slopes, Address stream) {
  const auto scoring = scoring_of(of);
  const auto rows = rows_of(z, "z", scoring.n > 0, kFp32);
  require_apart(rows, scoring, "z");
  irlfast::softmax_slopes(static_cast<float *>(rows.z), rows.stride, dtype_of(dtype, "slope", kUpToFp16),
                          pointer<const float>(bias, "bias", false), scoring,
                          pointer<float>(logps, "logps", scoring.n > 0), slopes, stream_of(stream));
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
             float momentum, float sign, Address stream) {
  const auto parameters = irlfast::parameters_of(rows);
  const irlfast::RMSprop options{lr, alpha, eps, weight_decay, momentum, sign};
  irlfast::rmsprop(parameters.data(), parameters.size(), options, stream_of(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "irlfast's kernels in CUDA C++; takes addresses, so use irlfast.optim and irlfast.ops instead.";
  module.attr("device") = IRLFAST_DEVICE;  // the device of the addresses
  module.def("token_logps", &token_logps);
  module.def("write_gradient", &write_gradient);
  module.def("softmax_slopes", &softmax_slopes);
  module.def("sequence_sums", &sequence_sums);
  module.def("rmsprop", &rmsprop);
}
