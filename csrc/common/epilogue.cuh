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

// SiLU of two values, which the caller has multiplied by kSiluScale<T>; T is what they are rounded to.
//
// bf16: v / (1 + e^-v) = h + h tanh h with h = v / 2, two instructions a value. The tanh is off by 2^-11 of itself at most, and so
// the SiLU by 2^-12 of |v|: of a positive value an eighth of what rounding to bf16 may change; of a negative one more than that,
// if little beside what the positive ones are rounded by: 7e-4 of -0.14 at -3, 1e-3 of -0.03 at -5. Far down tanh is -1 and the
// SiLU 0, as PTX says of infinity and processors do from 9 on; that of -infinity is NaN, as PyTorch has it.
//
// fp16 is eight times as fine: e^-v, and one reciprocal, that of (1 + e^-a)(1 + e^-b), for two. The product does not overflow,
// because exponents end at 2^57.7; there values end at -40, whose SiLU is -2e-16. NaN comes through in the numerator alone, so
// that it stays its own.
template <typename T> constexpr float kSiluScale = std::is_same_v<T, bf16> ? 0.5f : 1.f;
template <typename T> __device__ __forceinline__ void silu_of_two(float& a, float& b) {
  if constexpr (std::is_same_v<T, bf16>) {
    a += a * tanh_fast(a), b += b * tanh_fast(b);
  } else {
    constexpr float kLog2e = 1.4426950408889634f, kMost = 40.f * kLog2e;
    const float below_a = 1.f + exp2_fast(lesser(-kLog2e * a, kMost)), below_b = 1.f + exp2_fast(lesser(-kLog2e * b, kMost));
    const float both = reciprocal_fast(below_a * below_b);
    a = greater_or_nan(a, -40.f) * (both * below_b);
    b = greater_or_nan(b, -40.f) * (both * below_a);
  }
}
// The norm in front of it: `norm`, or where SiLU follows the same with its result multiplied by kSiluScale<T>.
template <typename T> __device__ __forceinline__ Affine before_silu(Affine norm, bool silu) {
  const float by = silu ? kSiluScale<T> : 1.f;
  return {norm.scale * by, norm.shift * by};
}

}  // namespace effnet_fast
