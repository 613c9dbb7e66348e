// Adjacent elements, read and written at once.
#pragma once

#include <cstdint>

namespace irlfast {

template <class T, int width>
struct alignas(sizeof(T) * width) Vector {
  T at[width];
};

template <int width, class T>
__device__ __forceinline__ Vector<T, width> read(const T *from) {
  return *reinterpret_cast<const Vector<T, width> *>(from);
}

template <int width, class T>
__device__ __forceinline__ void write(T *to, const Vector<T, width> &value) {
  *reinterpret_cast<Vector<T, width> *>(to) = value;
}

template <class T>
__device__ __forceinline__ std::uintptr_t address(const T *pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

}  // namespace irlfast
