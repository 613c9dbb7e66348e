// Existing logits, as the functions of the CPU and the GPU take them.
#pragma once

#include <cstdint>

namespace irlfast {

enum class Dtype { fp32, bf16, fp16, fp64 };

constexpr std::int64_t kIgnore = -100;  // a target that is skipped

// Rows of one vocabulary, `stride` elements apart.
struct Rows {
  void *z;
  Dtype dtype;
  std::int64_t stride;
};

// How rows of logits score targets [n]: by softcap(scale * z).
struct Scoring {
  std::int64_t n;
  int vocabulary;
  const std::int64_t *targets;
  float scale, softcap;  // softcap 0 stands for none
};

}  // namespace irlfast
