// What the depthwise kernels are given, on either device, and the functions that start them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/activation.h"
#include "../common/dtype.h"

namespace effnet_fast::depthwise {

// y = activation(norm(depthwise_conv(x))), norm(v) = (v - mean) / sqrt(var + eps) * norm_weight + norm_bias. Everything is
// contiguous in the order given, x but for its strides; of any alignment.
struct ForwardParams {
  const void* x;                    // [batch, height, width, channels], channels next to each other
  const void* weight;               // [channels, kernel, kernel], of type weight_dtype
  const void* norm_weight;          // [channels] or null (ones); the four vectors are of type norm_dtype
  const void* norm_bias;            // [channels] or null (zeros)
  const void* norm_mean;            // [channels]
  const void* norm_var;             // [channels]
  const void* packed;               // on the CPU what pack_cpu made of the weight and the norm, or null: they are packed anew
  void* y;                          // [batch, out_height, out_width, channels], of x's type
  float* partial;                   // [batch, pieces, channels]: sums of the stored y over parts of the image; null if pieces is 0
  int64_t batch;                    // > 0
  int64_t x_image, x_row, x_pixel;  // strides of x in elements
  int channels, height, width, out_height, out_width;
  int kernel, stride, pad_top, pad_left;  // 3 or 5, 1 or 2
  int pieces;
  float eps;
  Activation activation;
  DType dtype, weight_dtype, norm_dtype;
};

// Some rows and channels of an image's output.
struct Band {
  int64_t image;
  int first, last;                  // rows
  int first_channel, last_channel;  // the first is a multiple of 16, the last 16 or more further, or they are all channels
  float* partial;                   // [channels] or null: the sums of the rows
  bool adds;                        // to what is in partial already
};

void forward_cpu(const ForwardParams& p);
void band_cpu(const ForwardParams& p, const Band& band);  // by the calling thread
size_t packed_bytes(const ForwardParams& p);
void pack_cpu(const ForwardParams& p, void* packed);      // at a multiple of 64 bytes
void forward_cuda(const ForwardParams& p, void* stream);  // on the current device; of alignments see forward.cuh

}  // namespace effnet_fast::depthwise
