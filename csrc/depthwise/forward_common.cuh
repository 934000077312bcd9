// What both depthwise kernels share: their parameters, the activation, the roles of rows.
#pragma once
#include "../common/epilogue.cuh"
#include "params.h"

namespace effnet_fast::depthwise {

struct KernelParams : ForwardParams {
  int segment;      // output rows a block makes
  float low, high;  // the range of an activation other than SiLU
};

__host__ __device__ constexpr int floor_mod(int a, int b) { return (a % b + b) % b; }
__host__ __device__ constexpr bool divides(int a, int b) { return floor_mod(b, a) == 0; }

// The accumulator, one of `live`, of the output row whose tap row u is input row i of its stage; stride divides i - u.
__host__ __device__ constexpr int slot_of(int i, int u, int stride, int live) {
  return floor_mod((i - u + 16 * stride) / stride - 16, live);
}

template <bool kSilu> __device__ __forceinline__ float activate(float v, const KernelParams& p) {
  if constexpr (kSilu) {
    return v * reciprocal_fast(1.f + exp2_fast(-1.4426950408889634f * v));
  } else {
    return clamp(v, p.low, p.high);
  }
}

}  // namespace effnet_fast::depthwise
