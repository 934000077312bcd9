// What the squeeze-excite kernels are given, on either device, and the functions that start them.
#pragma once
#include <cstdint>

#include "../common/activation.h"
#include "../common/dtype.h"

namespace effnet_fast::squeeze_excite {

// gate[n] = sigmoid(expand(activation(reduce(sum_p partial[n, p] / count)))). Weights and biases are of type dtype, a null bias
// is zero; everything is contiguous, of any alignment.
struct GateParams {
  const float* partial;       // [batch, pieces, channels]
  const void* reduce_weight;  // [reduced, channels]
  const void* reduce_bias;    // [reduced] or null
  const void* expand_weight;  // [channels, reduced]
  const void* expand_bias;    // [channels] or null
  float* gate;                // [batch, channels]
  int64_t batch;
  int pieces, channels, reduced;
  float count;  // pixels that the squeeze averages over
  Activation activation;
  DType dtype;
};

void gate_cpu(const GateParams& p);
void gate_cuda(const GateParams& p, void* stream);  // on the current device

}  // namespace effnet_fast::squeeze_excite
