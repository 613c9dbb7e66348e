// Adjacent elements that are read and written at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace irlfast {

template <class T, int width>
struct alignas(sizeof(T) * width) Vector {
  T at[width];
};

template <int width, class T>
__device__ __forceinline__ Vector<T, width> read(const T *from) {
  return *reinterpret_cast<const Vector<T, width> *>(from);
}

template <class Word, class V>
__device__ __forceinline__ Word bits_of(const V &value) {
  Word bits;
  static_assert(sizeof bits == sizeof value);
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Intrinsics, because the compiler at times splits the store of a vector.
template <int width, class T>
__device__ __forceinline__ void write(T *to, const Vector<T, width> &value) {
  if constexpr (sizeof value == 16)
    __stwb(reinterpret_cast<uint4 *>(to), bits_of<uint4>(value));
  else if constexpr (sizeof value == 8)
    __stwb(reinterpret_cast<uint2 *>(to), bits_of<uint2>(value));
  else
    *reinterpret_cast<Vector<T, width> *>(to) = value;
}

template <class T>
__device__ __forceinline__ std::uintptr_t address(const T *pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

}  // namespace irlfast
