// What ends the kernels on tensor cores: the folded norm and the activation.
#pragma once
#include <cmath>

#include "cuda.h"

namespace effnet_fast {

struct Affine {
  float scale, shift;
};
// The batch norm of channel c, of parameters that carry its four vectors.
template <typename Params> __device__ __forceinline__ Affine fold_norm(const Params& p, int c) {
  const float weight = p.norm_weight ? load_float(p.norm_weight, p.norm_dtype, c) : 1.f;
  const float bias = p.norm_bias ? load_float(p.norm_bias, p.norm_dtype, c) : 0.f;
  const float scale = weight / sqrtf(load_float(p.norm_var, p.norm_dtype, c) + p.eps);
  return {scale, bias - load_float(p.norm_mean, p.norm_dtype, c) * scale};
}

// SiLU of two values by one reciprocal, that of (1 + e^-a)(1 + e^-b): three uses of the special function unit in place of four. The
// product does not overflow, because exponents end at 2^57.7; there values end at -40, whose SiLU is -2e-16. NaN comes through in
// the numerator alone, so that it stays its own.
__device__ __forceinline__ void silu_of_two(float& a, float& b) {
  constexpr float kLog2e = 1.4426950408889634f, kMost = 40.f * kLog2e;
  const float below_a = 1.f + exp2_fast(lesser(-kLog2e * a, kMost)), below_b = 1.f + exp2_fast(lesser(-kLog2e * b, kMost));
  const float both = reciprocal_fast(below_a * below_b);
  a = greater_or_nan(a, -40.f) * (both * below_b);
  b = greater_or_nan(b, -40.f) * (both * below_a);
}

}  // namespace effnet_fast
