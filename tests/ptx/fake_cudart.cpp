// In place of CUDA's runtime, as far as csrc/cuda uses it: a launch calls the function that Python has set, with the
// kernel's mangled name and its arguments. The host's code, which chooses grids and kernels, is the real one.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

using Launcher = int (*)(const char *kernel, const unsigned *grid, const unsigned *block, unsigned shared,
                         void **arguments);

Launcher launcher = nullptr;

std::map<const void *, std::string> &kernels() {
  static std::map<const void *, std::string> names;
  return names;
}

}  // namespace

extern "C" {

#define PUBLIC __attribute__((visibility("default")))

PUBLIC void set_launcher(Launcher function) { launcher = function; }

void **__cudaRegisterFatBinary(void *) {
  static void *handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}

void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *,
                            int *) {
  kernels()[host] = name;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
  if (!launcher) return cudaErrorNotReady;
  const unsigned grid[] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const unsigned block[] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  const auto shared = static_cast<unsigned>(config->dynamicSmemBytes);
  return launcher(kernels().at(kernel).c_str(), grid, block, shared, arguments) ? cudaErrorLaunchFailure : cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t) { return "the launch failed in the interpreter"; }

// The compiler's stubs for <<<...>>> refer to these; csrc/cuda launches by cudaLaunchKernelEx alone.
cudaError_t __cudaGetKernel(void *, const void *) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void *, dim3, dim3, void **, size_t, void *) { return cudaErrorNotSupported; }
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaErrorNotSupported; }

}  // extern "C"
