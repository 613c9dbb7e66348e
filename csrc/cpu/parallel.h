// Work runs on the OpenMP threads that PyTorch has loaded. After each of its operations they spin for a while, so that
// further threads would get half of a core. Without OpenMP, this file starts its own threads.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// The best target that the processor has is chosen when the module is loaded. Functions that they call are inlined
// (flatten): otherwise these would be compiled for the oldest processors.
#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__) || \
    defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IRLFAST_CLONES __attribute__((flatten))
#elif __GNUC__ >= 12
#define IRLFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define IRLFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#endif

namespace irlfast {

// Calls the function with the pointer on at most so many threads. The name is GNU's; LLVM and Intel have it too.
using Team = void (*)(void (*)(void *), void *, unsigned, unsigned flags);

inline Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// Calls work(begin, end) for contiguous shares of [0, count). Each has at least `least` elements, or is the only one.
template <class Work>
void parallel(std::int64_t count, std::int64_t least, int threads, const Work &work) {
  const std::int64_t shares = std::clamp<std::int64_t>(count / std::max<std::int64_t>(least, 1), 1, std::max(threads, 1));
  const auto start = [&](std::int64_t share) { return count / shares * share + std::min(share, count % shares); };
  std::atomic<std::int64_t> untaken{0};
  auto take = [&] {
    for (std::int64_t share; (share = untaken++) < shares;) work(start(share), start(share + 1));
  };
  if (shares == 1) {
    take();
  } else if (team()) {
    team()([](void *all) { (*static_cast<decltype(take) *>(all))(); }, &take, static_cast<unsigned>(shares), 0);
  } else {
    std::vector<std::thread> others(static_cast<std::size_t>(shares - 1));
    for (auto &thread : others) thread = std::thread(take);
    take();
    for (auto &thread : others) thread.join();
  }
}

// The least number of rows per thread, for rows of so many logits.
inline std::int64_t worth_a_thread(std::int64_t vocabulary) { return (1 << 14) / vocabulary + 1; }

}  // namespace irlfast
