// What the kernel of an expansion and a depthwise convolution in one is given, and the function that starts it.
#pragma once
#include "../depthwise/params.h"

namespace effnet_fast::expand_depthwise {

// The pointwise convolution in front, with its norm. Everything is contiguous in the order given, of any alignment but the weight,
// which starts at a multiple of 16 bytes.
struct Expansion {
  const void* weight;       // [channels, in_channels], of type weight_dtype
  const void* norm_weight;  // [channels] or null (ones); the four vectors are of type norm_dtype
  const void* norm_bias;    // [channels] or null (zeros)
  const void* norm_mean;    // [channels]
  const void* norm_var;     // [channels]
  int in_channels;
  float eps;
  DType weight_dtype, norm_dtype;
};

// y = activation(norm(depthwise_conv(activation(expand_norm(x W^T))))): beside what the depthwise convolution alone takes, where x
// is [batch, height, width, expand.in_channels] here, pixels next to each other.
struct ForwardParams : depthwise::ForwardParams {
  Expansion expand;
};

void forward_cuda(const ForwardParams& p, void* stream);  // on the current device; half types; of alignments see forward.cuh

}  // namespace effnet_fast::expand_depthwise
