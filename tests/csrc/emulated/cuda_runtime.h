// CUDA's kernels on a CPU, in place of CUDA's own header: the threads of a block are fibres, which take turns from one
// barrier or shuffle to the next; blocks run one after the other. What each thread does is what it does on a GPU, but
// for the last bits of exp, log and products that are contracted.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using std::min;
template <class T>
void __stwb(T *to, T value) {
  *to = value;
}
inline float __fdividef(float x, float y) { return x / y; }

namespace emulated {

constexpr std::size_t kStack = 1 << 18;

struct Thread {
  ucontext_t start;
  jmp_buf resumed;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started, done;
  std::uint64_t shuffled[2];
  unsigned shuffles;
};

inline Thread threads[1024];
inline jmp_buf scheduler;
inline std::function<void()> kernel;

inline Thread &current() { return threads[threadIdx.x]; }

// Until every thread of the block has come as far.
inline void wait() {
  if (!_setjmp(current().resumed)) _longjmp(scheduler, 1);
}

inline void run() {
  kernel();
  current().done = true;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned x) {
  threadIdx = dim3(x, 0, 0);
  Thread &thread = current();
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.resumed, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.get();
  thread.start.uc_stack.ss_size = kStack;
  makecontext(&thread.start, run, 0);
  setcontext(&thread.start);
}

inline void run_block() {
  const unsigned count = blockDim.x;
  for (unsigned x = 0; x < count; ++x) threads[x].started = threads[x].done = false, threads[x].shuffles = 0;
  // Threads go first to last and last to first by turns: without a barrier where one is needed, results are wrong.
  for (unsigned turn = 0, done = 0; done < count; ++turn) {
    for (unsigned k = 0; k < count; ++k) resume(turn % 2 ? count - 1 - k : k);
    done = static_cast<unsigned>(std::count_if(threads, threads + count, [](const Thread &t) { return t.done; }));
    if (done && done < count) std::fputs("a barrier that some threads do not reach\n", stderr), std::abort();
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto &mine = emulated::current();
  const unsigned turn = mine.shuffles++ % 2;
  std::memcpy(&mine.shuffled[turn], &value, sizeof value);
  emulated::wait();
  std::memcpy(&value, &emulated::threads[threadIdx.x ^ static_cast<unsigned>(mask)].shuffled[turn], sizeof value);
  return value;
}

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess };
inline const char *cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               const Arguments &...arguments) {
  emulated::kernel = [&] { kernel(static_cast<Parameters>(arguments)...); };
  gridDim = config->gridDim, blockDim = config->blockDim;
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) emulated::run_block();
  return cudaSuccess;
}
