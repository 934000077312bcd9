// What the dense convolution kernels are given, on either device, and the functions that start them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/activation.h"
#include "../common/dtype.h"

namespace effnet_fast::conv {

// y = activation(norm(conv(x))) + residual, norm(v) = (v - mean) / sqrt(var + eps) * norm_weight + norm_bias. Everything is
// contiguous in the order given, x but for its strides; of any alignment. Where there are pixels, x is of bytes, and a channel's
// are convolved as x * scale + shift, with zeros around that.
struct Params {
  const void* x;                               // [batch, in_channels, height, width], of type dtype or of bytes
  const float* pixels;                         // [2, in_channels]: scale and shift of an x of bytes; or null
  const void* weight;                          // [channels, in_channels, kernel, kernel], of type weight_dtype
  const void* norm_weight;                     // [channels] or null (ones); the four vectors are of type norm_dtype
  const void* norm_bias;                       // [channels] or null (zeros)
  const void* norm_mean;                       // [channels]
  const void* norm_var;                        // [channels]
  const void* packed;                          // what pack_cpu made of the weight and the norm, or null: they are packed anew
  const void* residual;                        // [batch, out_height, out_width, channels], of type dtype, or null
  void* y;                                     // [batch, out_height, out_width, channels], of type dtype
  int64_t batch;                               // > 0
  int64_t x_image, x_channel, x_row, x_pixel;  // strides of x in elements
  int in_channels, channels, height, width, out_height, out_width;
  int kernel, stride, pad_top, pad_left;
  float eps;
  Activation activation;
  DType dtype, weight_dtype, norm_dtype;
};

void conv_cpu(const Params& p);
size_t packed_bytes(const Params& p);
void pack_cpu(const Params& p, void* packed);      // at a multiple of 64 bytes
void forward_cuda(const Params& p, void* stream);  // on the current device; a stem's window and half types: see forward.cuh

}  // namespace effnet_fast::conv
