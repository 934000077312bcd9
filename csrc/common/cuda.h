// What a kernel file (.cuh) needs beside CUDA C++ itself. Under g++ the same names come from the emulator's emu.h
// (tests/emulator), which runs each block's threads as fibers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dtype.h"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the CUDA kernels need compute capability 8.0 or higher: set TORCH_CUDA_ARCH_LIST to 8.0 and up"
#endif
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// Programmatic dependent launch (sm_90), with which a kernel comes to its place before the one ahead has ended and waits there, was
// tried on an H200 and taken back: one image of B0 gained 1.5 % and lost 19 % where more than one kernel was let wait, B5 lost 2 to
// 7 % in the better form (benchmarks/results/model-trials-cuda.json).
#define EFFNET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define EFFNET_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(128) unsigned char name##_storage[]; \
  type* name = reinterpret_cast<type*>(name##_storage)
// Before a launch with that much dynamic shared memory: more than 48 KB must be asked for.
#define EFFNET_ALLOW_SHARED(kernel, bytes) \
  if ((bytes) > 48 << 10) EFFNET_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)))
// The error is not kept: the next kernel has not failed.
#define EFFNET_CUDA_CHECK(expression)                                                                             \
  do {                                                                                                            \
    if (const cudaError_t error = (expression); error != cudaSuccess) {                                           \
      static_cast<void>(cudaGetLastError());                                                                      \
      throw std::runtime_error(std::string("effnet_fast: " #expression " failed: ") + cudaGetErrorString(error)); \
    }                                                                                                             \
  } while (false)
#else
#include "emu.h"
#endif

#ifdef __CUDACC__
namespace effnet_fast {

// Starts a kernel with an attribute, or where that is null without.
template <typename... Parameters, typename... Arguments>
void launch_with(cudaLaunchAttribute* attribute, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                 size_t shared_bytes, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  EFFNET_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace effnet_fast
#endif

namespace effnet_fast {

template <typename A, typename B> __host__ __device__ constexpr auto ceil_div(A a, B b) { return (a + b - 1) / b; }

// V consecutive elements moved by one instruction; the address must be a multiple of the whole.
template <typename T, int V> struct alignas(sizeof(T) * V) Vec {
  T at[V];
};
template <int V, typename T> __device__ __forceinline__ Vec<T, V> load(const T* p) {
  return *reinterpret_cast<const Vec<T, V>*>(p);
}
template <typename T, int V> __device__ __forceinline__ void store(T* p, const Vec<T, V>& v) {
  *reinterpret_cast<Vec<T, V>*>(p) = v;
}
__host__ __device__ __forceinline__ bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

#ifdef __CUDACC__
// 2^v within 2 ulp and 1 / v within 1 ulp, one instruction each; subnormal results are zero.
__device__ __forceinline__ float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float reciprocal_fast(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// tanh v within 2^-11 of itself, one instruction.
__device__ __forceinline__ float tanh_fast(float v) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// v between low and high; NaN stays NaN.
__device__ __forceinline__ float clamp(float v, float low, float high) {
  float r;
  asm("{ .reg .f32 t; max.NaN.f32 t, %1, %2; min.NaN.f32 %0, t, %3; }" : "=f"(r) : "f"(v), "f"(low), "f"(high));
  return r;
}
// The smaller of two, of a number and NaN the number.
__device__ __forceinline__ float lesser(float a, float b) { return fminf(a, b); }
// The greater of two, of a number and NaN that.
__device__ __forceinline__ float greater_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// Two floats rounded to nearest even, the first in the low half.
template <typename T> __device__ __forceinline__ uint32_t round_pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}
// A zero that the compiler may not make early: a plain zero on a rarely taken path is hoisted above the branch, for everyone.
__device__ __forceinline__ float late_zero() {
  float r;
  asm volatile("mov.f32 %0, 0f00000000;" : "=f"(r));
  return r;
}
// Keeps a value in its register: under register pressure nvcc would rather work a constant out again at every use.
template <typename T> __device__ __forceinline__ T pin(T v) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(v));
  } else {
    asm volatile("" : "+r"(v));
  }
  return v;
}
// Likewise an address of global memory, which it still is to the compiler.
template <typename T> __device__ __forceinline__ T* pin_global(T* p) {
  T* const pinned = pin(p);
  __builtin_assume(__isGlobal(pinned));
  return pinned;
}
#endif

template <typename T> __device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    return T{static_cast<uint16_t>(round_pair<T>(v, 0.f))};
  }
}
// Half e of some that lie two in a register.
template <typename T, int N> __device__ __forceinline__ float value_of(const Vec<uint32_t, N>& pairs, int e) {
  return to_float(T{uint16_t(pairs.at[e / 2] >> e % 2 * 16)});
}
// An element of an array of a type known at run time.
__device__ __forceinline__ float load_float(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::fp32) return static_cast<const float*>(p)[i];
  return dtype == DType::bf16 ? to_float(static_cast<const bf16*>(p)[i]) : to_float(static_cast<const fp16*>(p)[i]);
}

}  // namespace effnet_fast
