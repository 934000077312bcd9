// What both depthwise kernels share: their parameters and the activation.
#pragma once
#include "../common/epilogue.cuh"
#include "../common/sliding.cuh"
#include "params.h"

namespace effnet_fast::depthwise {

struct KernelParams : ForwardParams {
  int segment;      // output rows a block makes
  float low, high;  // the range of an activation other than SiLU
};

template <bool kSilu> __device__ __forceinline__ float activate(float v, const KernelParams& p) {
  if constexpr (kSilu) {
    return v * reciprocal_fast(1.f + exp2_fast(-1.4426950408889634f * v));
  } else {
    return clamp(v, p.low, p.high);
  }
}

}  // namespace effnet_fast::depthwise
