// Storage types and their values as float, the same bits on host and device. Kernels compute in fp32.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#include <cuda_fp16.h>
#define EFFNET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EFFNET_HOST_DEVICE inline
#endif

namespace effnet_fast {

enum class DType { fp32, bf16, fp16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }  // in bytes

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

EFFNET_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

EFFNET_HOST_DEVICE float to_float(float value) { return value; }
EFFNET_HOST_DEVICE float to_float(uint8_t value) { return float(value); }
EFFNET_HOST_DEVICE float to_float(bf16 value) { return float_of_bits(uint32_t(value.bits) << 16); }
EFFNET_HOST_DEVICE float to_float(fp16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // Exponents are rebiased from 15 to 127. A subnormal gets an implicit one, which is then subtracted, so that no fp32
  // subnormal arises (the process may flush those to zero).
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const float normal = float_of_bits(magnitude + (exponent == 0x0f800000u ? 224u << 23 : 112u << 23));
  const float subnormal = float_of_bits(magnitude + (113u << 23)) - float_of_bits(113u << 23);
  const float absolute = exponent == 0 ? subnormal : normal;
  return value.bits & 0x8000u ? -absolute : absolute;
#endif
}

// Calls f with a value of the storage type, from which a generic lambda takes its T: with_dtype(d, [&](auto t) { using T =
// decltype(t); ... }).
template <typename F> void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::fp32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::fp16: return f(fp16{});
  }
}

}  // namespace effnet_fast
