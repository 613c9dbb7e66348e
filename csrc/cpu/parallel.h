// Threads of our own: a second OpenMP runtime beside torch's would need a library that is not on every machine, and
// its idle threads would spin against torch's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

// The best of these that the processor has is chosen when the module is loaded. What they call must become part of them
// (flatten), or it would be compiled for the least of processors.
#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__) || defined(__SANITIZE_ADDRESS__)
#define IRLFAST_CLONES __attribute__((flatten))
#elif __GNUC__ >= 12
#define IRLFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define IRLFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#endif

namespace irlfast {

// Calls work(begin, end) for contiguous shares of [0, count), none smaller than `least` but the only one.
template <class Work>
void parallel(std::int64_t count, std::int64_t least, int threads, const Work &work) {
  const std::int64_t shares = std::clamp<std::int64_t>(count / std::max<std::int64_t>(least, 1), 1, std::max(threads, 1));
  const auto start = [&](std::int64_t share) { return count / shares * share + std::min(share, count % shares); };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(shares - 1));
  for (std::int64_t share = 1; share < shares; ++share)
    others.emplace_back([&work, first = start(share), last = start(share + 1)] { work(first, last); });
  work(0, start(1));
  for (auto &thread : others) thread.join();
}

// Rows of so many logits.
inline std::int64_t worth_a_thread(std::int64_t vocabulary) { return (1 << 14) / vocabulary + 1; }

}  // namespace irlfast
