// Launches whose errors name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace irlfast {

template <class... Parameters, class... Arguments>
void launch(const char *name, void (*kernel)(Parameters...), unsigned blocks, unsigned columns, unsigned threads,
            void *stream, const Arguments &...arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks, columns);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace irlfast
