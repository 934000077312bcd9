// What the bindings of the convolutions share.
#pragma once
#include <limits>
#include <tuple>
#include <vector>

#include "torch.h"

namespace effnet_fast::binding {

using torch::headeronly::MemoryFormat;

struct NormTensors {
  OptionalTensor weight, bias;
  Tensor mean, var;
  double eps;
};

struct ConvShape {
  int64_t out_channels;
  int kernel, out_height, out_width;
};

// Checks x [N, C, H, W], weight [K, C/groups, k, k], stride and padding.
inline ConvShape conv_shape(const char* op, const Tensor& x, const Tensor& weight, int64_t stride,
                            const std::vector<int64_t>& padding) {
  check(x.dim() == 4, op, ": x has shape ", shape_text(x), ", expected [N, C, H, W]");
  check(weight.dim() == 4 && weight.size(0) > 0 && weight.size(2) > 0 && weight.size(2) == weight.size(3), op,
        ": weight has shape ", shape_text(weight), ", expected [K, C/groups, k, k]");
  constexpr int64_t limit = std::numeric_limits<int>::max() / 64;
  check(stride >= 1 && stride < limit, op, ": stride must be from 1 to 2^25, got ", stride);
  check(padding.size() == 4, op, ": padding must have 4 sides, got ", padding.size());
  for (const int64_t side : padding) check(side >= 0 && side < limit, op, ": padding must be from 0 to 2^25, got ", side);
  for (int64_t i = 1; i < 4; ++i)
    check(x.size(i) >= 1 && x.size(i) < limit, op, ": x has shape ", shape_text(x), ", expected C, H and W from 1 to 2^25");
  const int64_t kernel = weight.size(2);
  check(weight.size(0) < limit && kernel < limit, op, ": weight has shape ", shape_text(weight), ", expected K and k up to 2^25");
  const auto out_size = [&](int64_t size, int64_t before, int64_t after) {
    check(size + before + after >= kernel, op, ": the kernel is larger than the padded input");
    return int((size + before + after - kernel) / stride + 1);
  };
  return {weight.size(0), int(kernel), out_size(x.size(2), padding[0], padding[1]), out_size(x.size(3), padding[2], padding[3])};
}

// [N, K, H', W'], channels_last, on x's device. On the CPU large ones take turns in memory that the module keeps; the storage of
// such a one cannot be resized.
Tensor empty_output(const Tensor& x, const ConvShape& s, ScalarType dtype);

// Whether [N, C, H, W] lies in memory as [N, H, W, C] without gaps; strides of dimensions of size 1 mean nothing.
inline bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t i : {1, 3, 2, 0}) {
    if (t.size(i) != 1 && t.stride(i) != expected) return t.numel() == 0;
    expected *= t.size(i);
  }
  return true;
}

inline Tensor in_channels_last(const Tensor& t) {
  before_other_kernels();
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}
inline Tensor as_channels_last(const Tensor& t) { return is_channels_last(t) ? t : in_channels_last(t); }

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// What CUDA's kernels read 16 bytes at a time: a copy of a view at an odd place, which is rare.
inline Tensor on_16_bytes(const Tensor& t) {
  if (t.is_cpu() || aligned16(t.const_data_ptr())) return t;
  before_other_kernels();
  return torch::stable::clone(t);
}

inline void check_output(const char* op, const char* name, const Tensor& y, const Tensor& x, const ConvShape& s, ScalarType dtype) {
  check_shape(op, name, y, {x.size(0), s.out_channels, s.out_height, s.out_width});
  check_same_device(op, name, y, x);
  check_apart(op, name, y, x);
  check(y.scalar_type() == dtype && is_channels_last(y), op, ": ", name, " must be channels_last in the result's dtype");
}

// The weight and the norm as the kernels read them.
struct ConvTensors {
  Tensor weight;
  NormTensors norm;
  DType weight_dtype, norm_dtype;
};

// What messages call the weight and the norm's vectors.
struct ConvNames {
  const char *weight = "weight", *norm_weight = "norm_weight", *norm_bias = "norm_bias", *norm_mean = "norm_mean",
             *norm_var = "norm_var";
};

inline ConvTensors conv_tensors(const char* op, const Tensor& x, const Tensor& weight, const NormTensors& norm,
                                const ConvNames& names = {}) {
  const auto read = [&](const char* name, const Tensor& t) {
    check_same_device(op, name, t, x);
    return as_parameter(t);
  };
  const Tensor taps = read(names.weight, weight), mean = read(names.norm_mean, norm.mean);
  const auto read_vector = [&](const char* name, const Tensor& t) {
    check_shape(op, name, t, {weight.size(0)});
    check(t.scalar_type() == norm.mean.scalar_type(), op, ": ", name, " must have the dtype of ", names.norm_mean);
    return read(name, t);
  };
  const auto read_optional = [&](const char* name, const OptionalTensor& t) {
    return t ? OptionalTensor(read_vector(name, *t)) : std::nullopt;
  };
  check_shape(op, names.norm_mean, mean, {weight.size(0)});
  return {taps,
          {read_optional(names.norm_weight, norm.weight), read_optional(names.norm_bias, norm.bias), mean,
           read_vector(names.norm_var, norm.var), norm.eps},
          dtype_of(op, names.weight, taps),
          dtype_of(op, names.norm_mean, mean)};
}

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// Points the params' weight and norm into the tensors, which must live as long.
template <typename Params> void set_parameters(Params& p, const ConvTensors& t) {
  p.weight = t.weight.const_data_ptr();
  p.norm_weight = data_or_null(t.norm.weight);
  p.norm_bias = data_or_null(t.norm.bias);
  p.norm_mean = t.norm.mean.const_data_ptr();
  p.norm_var = t.norm.var.const_data_ptr();
  p.eps = float(t.norm.eps);
  p.weight_dtype = t.weight_dtype;
  p.norm_dtype = t.norm_dtype;
}

// What the params of all k x k convolutions hold. They point into the tensors, which must live as long.
template <typename Params> Params conv_params(const char* op, const Tensor& x, const ConvTensors& t, int64_t stride,
                                              const std::vector<int64_t>& padding, const std::string& activation,
                                              const ConvShape& shape, const Tensor& y, DType dtype) {
  Params p{};
  p.x = x.const_data_ptr();
  set_parameters(p, t);
  p.y = y.mutable_data_ptr();
  p.batch = x.size(0);
  p.x_image = x.stride(0);
  p.x_row = x.stride(2);
  p.x_pixel = x.stride(3);
  p.channels = int(shape.out_channels);
  p.height = int(x.size(2));
  p.width = int(x.size(3));
  p.out_height = shape.out_height;
  p.out_width = shape.out_width;
  p.kernel = shape.kernel;
  p.stride = int(stride);
  p.pad_top = int(padding[0]);
  p.pad_left = int(padding[2]);
  p.activation = activation_of(op, activation);
  p.dtype = dtype;
  return p;
}

}  // namespace effnet_fast::binding
