// What the pointwise convolution is given, and the function that starts it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/activation.h"
#include "../common/dtype.h"

namespace effnet_fast::pointwise {

// y = activation(norm((x * gate) weight^T)) + residual. Everything is contiguous (x, y and residual as channels_last) but for y's
// rows, of any alignment.
struct Params {
  const void* x;            // [rows, in_channels], of type dtype as are residual and y
  const void* weight;       // [out_channels, in_channels]
  const void* norm_weight;  // [out_channels] or null: ones
  const void* norm_bias;    // [out_channels] or null: zeros
  const void* norm_mean;    // [out_channels]
  const void* norm_var;     // [out_channels]
  const void* packed;       // what pack_cpu made of the weight and the norm, or null: they are packed anew
  const float* gate;        // [rows / pixels, in_channels] or null: ones
  const void* residual;     // [rows, out_channels] or null
  void* y;                  // [rows, out_channels], every y_row elements a row
  int64_t y_row;
  int64_t rows;    // images * pixels
  int64_t pixels;  // of an image
  int in_channels, out_channels;
  float eps;
  Activation activation;
  DType dtype, weight_dtype, norm_dtype;
};

// A rectangle of the output. Its first channel is a multiple of panel_channels(), its last too or the last of all.
struct Part {
  int64_t first_row, last_row;
  int first_channel, last_channel;
};

void conv_bn_act_cpu(const Params& p);
void part_cpu(const Params& p, const Part& part);  // by the calling thread
int panel_channels();
size_t packed_bytes(const Params& p);
void pack_cpu(const Params& p, void* packed);      // at a multiple of 64 bytes
void forward_cuda(const Params& p, void* stream);  // on the current device; of types and alignments see forward.cuh

}  // namespace effnet_fast::pointwise
