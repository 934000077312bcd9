// Activations of training's CUDA kernels, with their slopes.
#pragma once
#include <cmath>

#include "../common/activation.h"
#include "../common/cuda.h"

namespace effnet_fast::training {

// SiLU, or a clamp from low to high: relu, relu6, identity. Its slope is 0 from flat_below down and from flat_above up, which are
// NaN where there is no such end: then not even infinity is beyond it.
struct Range {
  bool silu;
  float low, high, flat_below, flat_above;
  explicit Range(Activation activation)
      : silu(activation == Activation::silu),
        low(activation == Activation::identity ? -INFINITY : 0.f),
        high(activation == Activation::relu6 ? 6.f : INFINITY),
        flat_below(activation == Activation::identity ? NAN : 0.f),
        flat_above(activation == Activation::relu6 ? 6.f : NAN) {}
};

struct ValueAndSlope {
  float value, slope;
};

template <bool kSilu> __device__ __forceinline__ ValueAndSlope activate_with_slope(const Range& range, float u) {
  if constexpr (kSilu) {
    const float sigmoid = reciprocal_fast(1.f + exp2_fast(-1.4426950408889634f * u)), value = u * sigmoid;
    return {value, sigmoid + value * (1.f - sigmoid)};
  } else {
    return {clamp(u, range.low, range.high), u <= range.flat_below || u >= range.flat_above ? 0.f : 1.f};
  }
}

// Calls f(std::true_type) for SiLU, f(std::false_type) for a clamp: a branch around a row, not one around each element. kSilu: it
// is known to be SiLU.
template <bool kSilu, typename F> __device__ __forceinline__ void with_silu(const Range& range, const F& f) {
  if (kSilu || range.silu) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace effnet_fast::training
