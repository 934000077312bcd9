// What the steps of a chain share: the block, and how a norm's channels end.
#pragma once
#include <algorithm>

#include "../common/epilogue.cuh"
#include "../common/grid.h"
#include "../common/tensor_core.h"
#include "params.h"

namespace effnet_fast::chain {

// A step's function is called by all threads with `memory`, which is shared and which the step before has left, and `wait`, which
// it calls once, when it has all that no step makes. Its plan deals it out to so many blocks, and returns the bytes of memory that
// it takes.
constexpr int kWarps = 8, kThreads = 32 * kWarps;

// Activations of pairs: what follows a norm that before_silu has been asked of.
struct Ending {
  bool silu;
  float low, high;
};
__device__ __forceinline__ Ending ending_of(Activation activation) {
  return {activation == Activation::silu, activation == Activation::identity ? -INFINITY : 0.f,
          activation == Activation::relu6 ? 6.f : INFINITY};
}
template <typename T> __device__ __forceinline__ void end(const Ending& ending, float& a, float& b) {
  if (ending.silu) {
    silu_of_two<T>(a, b);
  } else {
    a = clamp(a, ending.low, ending.high), b = clamp(b, ending.low, ending.high);
  }
}

}  // namespace effnet_fast::chain
