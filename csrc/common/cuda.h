// What a kernel file (.cuh) needs beside CUDA C++ itself. Under g++ the same names come from the emulator's emu.h
// (tests/emulator), which runs each block's threads as fibers.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define EFFNET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define EFFNET_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(16) unsigned char name##_storage[]; \
  type* name = reinterpret_cast<type*>(name##_storage)
#define EFFNET_CUDA_CHECK(expression)                                                                             \
  do {                                                                                                            \
    if (const cudaError_t error = (expression); error != cudaSuccess)                                             \
      throw std::runtime_error(std::string("effnet_fast: " #expression " failed: ") + cudaGetErrorString(error)); \
  } while (false)
#else
#include "emu.h"
#endif

namespace effnet_fast {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// V consecutive elements moved by one instruction; the address must be a multiple of the whole.
template <typename T, int V> struct alignas(sizeof(T) * V) Vec {
  T at[V];
};
template <int V, typename T> __device__ __forceinline__ Vec<T, V> load(const T* p) {
  return *reinterpret_cast<const Vec<T, V>*>(p);
}
__device__ __forceinline__ bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace effnet_fast
