// RMSprop, one formula for the CPU and the GPU. Neither fuses products and sums, so both compute the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace irlfast {

struct RMSprop {
  float lr, alpha, eps, weight_decay, momentum;
  float sign;  // of the gradients: -1 to maximise
};

// One parameter of n elements. `average` is null unless centred, `buffer` unless there is momentum, `copy` unless the
// parameter itself is bf16 and `param` its fp32 master. Exactly one of `grad` and `grad_bf16` is given.
struct Parameter {
  std::int64_t n;
  float *param, *square, *average, *buffer;
  const float *grad;
  const bf16 *grad_bf16;
  bf16 *copy;
};

// The step of one element. Returns the parameter. `average` is null unless centred, `buffer` unless there is momentum.
IRLFAST_INLINE float updated(float grad, float param, float *square, float *average, float *buffer, const RMSprop &o) {
  const float g = grad * o.sign + o.weight_decay * param;
  const float s = o.alpha * *square + (1 - o.alpha) * g * g;
  float variance = s;
  if (average) {
    *average += (1 - o.alpha) * (g - *average);
    variance -= *average * *average;
  }
  float step = g / (std::sqrt(variance) + o.eps);
  if (buffer) *buffer = step = o.momentum * *buffer + step;
  *square = s;
  return param - o.lr * step;
}

}  // namespace irlfast
