// The frozen batch norm that travels with a convolution.
#pragma once
#include <cmath>

#include "dtype.h"

namespace effnet_fast {

// y -> (y - mean) / sqrt(var + eps) * weight + bias, per channel. All vectors are contiguous and of type dtype; a null weight is
// one, a null bias zero.
struct Norm {
  const void* weight;
  const void* bias;
  const void* mean;
  const void* var;
  float eps;
  DType dtype;
};

// The same as y -> scale * y + shift, for channels [first, first + count).
inline void fold_norm(const Norm& norm, int first, int count, float* scale, float* shift) {
  with_dtype(norm.dtype, [&](auto type) {
    using T = decltype(type);
    const auto at = [&](const void* vector, int i) { return to_float(static_cast<const T*>(vector)[first + i]); };
    for (int i = 0; i < count; ++i) {
      scale[i] = (norm.weight ? at(norm.weight, i) : 1.f) / sqrtf(at(norm.var, i) + norm.eps);
      shift[i] = (norm.bias ? at(norm.bias, i) : 0.f) - at(norm.mean, i) * scale[i];
    }
  });
}

}  // namespace effnet_fast
