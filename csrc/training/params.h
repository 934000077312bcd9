// What training's ops are given, and the functions that start them. effnet_fast/ops/training says what they compute; tensors are
// contiguous as channels_last, vectors are fp32.
#pragma once
#include <cstdint>
#include <functional>

#include "../common/activation.h"
#include "../common/dtype.h"

namespace effnet_fast::training {

// a = activation(scale * (x - mean) + bias) * gate, or x itself.
struct Read {
  const void* x;
  const float* norm;  // [3, channels]: mean, scale, bias; null: x is read as it is
  const float* gate;  // [images, channels] or null: ones
  Activation activation;
};

// g = of_grad * (grad * gate + pool) * activation'(norm(y)) + of_y * (y - mean) + shift, the gradient of y.
struct Gradient {
  const void* grad;
  const void* y;
  const float* norm;          // [3, channels]
  const float* coefficients;  // [3, channels]: of_grad, of_y, shift
  const float* gate;          // [images, channels] or null: ones
  const float* pool;          // [images, channels] or null: zeros
  Activation activation;
};

struct Pointwise {
  Read read;  // [rows, in_channels]
  const void* weight;
  int64_t images, pixels;  // rows = images * pixels
  int in_channels, out_channels;
  DType dtype, weight_dtype;
};

struct Depthwise {
  Read read;  // without a gate
  const void* weight;
  int64_t images;
  int channels, height, width, out_height, out_width, kernel, stride, pad_top, pad_left;
  DType dtype, weight_dtype;
};

// Of [images, pixels, channels].
struct Elements {
  Read read;
  int64_t images, pixels;
  int channels;
  DType dtype;
};

struct Stats {
  void* y;
  float *mean, *var;
};

// Null where it is not wanted.
struct Gradients {
  Gradient of_y;
  const void* residual;  // added to grad_x, or null
  void* grad_x;
  float* grad_weight;  // fp32, whatever the weight's type
  float* sums;         // [2, in_channels] where x has a norm, [images, 5, in_channels] where it has a gate
};

void pointwise_stats_cpu(const Pointwise& p, const Stats& made);
void pointwise_backward_cpu(const Pointwise& p, const Gradients& made);
void depthwise_stats_cpu(const Depthwise& p, const Stats& made);
void depthwise_backward_cpu(const Depthwise& p, const Gradients& made);

// Memory for so many floats on the device, alive until what was started there has ended.
using Allocate = std::function<float*(int64_t floats)>;
void depthwise_stats_cuda(const Depthwise& p, const Stats& made, const Allocate& allocate, void* stream);  // on the current device
void pointwise_stats_cuda(const Pointwise& p, const Stats& made, const Allocate& allocate, void* stream);  // likewise
void pointwise_backward_cuda(const Pointwise& p, const Gradients& made, const Allocate& allocate, void* stream);
void depthwise_backward_cuda(const Depthwise& p, const Gradients& made, const Allocate& allocate, void* stream);

void norm_act_cpu(const Elements& p, const void* residual, void* out);
void norm_act_mean_cpu(const Elements& p, float* mean);
void norm_act_sums_cpu(const Elements& p, const void* grad, float* sums);
void norm_act_image_sums_cpu(const Elements& p, const void* grad, float* sums);
void norm_act_backward_cpu(const Elements& p, const void* grad, const void* residual, void* grad_x, float* sums);
void norm_gradient_cpu(const Elements& p, const Gradient& of_y, void* out);  // p.read is not looked at
void batch_stats_cpu(const Elements& p, float* mean, float* var);            // of p.read.x as it is

}  // namespace effnet_fast::training
