// Activations in fp32, chosen at run time: outside inner loops a switch costs nothing.
#pragma once
#include <cmath>

#include "dtype.h"

namespace effnet_fast {

enum class Activation { identity, silu, relu, relu6, sigmoid };

// Comparisons are written so that NaN stays NaN.
EFFNET_HOST_DEVICE float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::identity: break;
    case Activation::silu:
    case Activation::sigmoid: return (activation == Activation::silu ? v : 1.f) / (1.f + expf(-v));  // one division to inline
    case Activation::relu: return v < 0.f ? 0.f : v;
    case Activation::relu6: return v < 0.f ? 0.f : v > 6.f ? 6.f : v;
  }
  return v;
}

}  // namespace effnet_fast
