// effnet_fast::conv_bn_act.native. The schema is in effnet_fast/ops/conv.
#include "../conv/params.h"

#include "conv.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kConv = "conv_bn_act";

void conv_out(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
              const Tensor& norm_mean, const Tensor& norm_var, double norm_eps, const OptionalTensor& residual, int64_t stride,
              std::vector<int64_t> padding, const std::string& activation, const Tensor& y) {
  const ConvShape shape = conv_shape(kConv, x, weight, stride, padding);
  check(weight.size(1) == x.size(1), kConv, ": weight has shape ", shape_text(weight), ", expected [K, ", x.size(1), ", k, k]");
  check_output(kConv, "y", y, x, shape);
  OptionalTensor added;
  if (residual) {
    check_shape(kConv, "residual", *residual, {x.size(0), shape.out_channels, shape.out_height, shape.out_width});
    check_same_device(kConv, "residual", *residual, x);
    check(residual->scalar_type() == x.scalar_type(), kConv, ": residual must have x's dtype");
    added = as_channels_last(*residual);
  }
  const ConvTensors t = conv_tensors(kConv, x, weight, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps});
  conv::Params p{};
  p.x = x.const_data_ptr();
  p.weight = t.weight.const_data_ptr();
  p.norm_weight = data_or_null(t.norm.weight);
  p.norm_bias = data_or_null(t.norm.bias);
  p.norm_mean = t.norm.mean.const_data_ptr();
  p.norm_var = t.norm.var.const_data_ptr();
  p.residual = data_or_null(added);
  p.y = y.mutable_data_ptr();
  p.batch = x.size(0);
  p.x_image = x.stride(0);
  p.x_channel = x.stride(1);
  p.x_row = x.stride(2);
  p.x_pixel = x.stride(3);
  p.in_channels = int(x.size(1));
  p.channels = int(shape.out_channels);
  p.height = int(x.size(2));
  p.width = int(x.size(3));
  p.out_height = shape.out_height;
  p.out_width = shape.out_width;
  p.kernel = shape.kernel;
  p.stride = int(stride);
  p.pad_top = int(padding[0]);
  p.pad_left = int(padding[2]);
  p.eps = float(norm_eps);
  p.activation = activation_of(kConv, activation);
  p.dtype = dtype_of(kConv, "x", x);
  p.weight_dtype = t.weight_dtype;
  p.norm_dtype = t.norm_dtype;
  if (p.batch > 0) conv::conv_cpu(p);
}

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
            const Tensor& norm_mean, const Tensor& norm_var, double norm_eps, const OptionalTensor& residual, int64_t stride,
            std::vector<int64_t> padding, const std::string& activation) {
  const Tensor y = empty_output(x, conv_shape(kConv, x, weight, stride, padding));
  conv_out(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, residual, stride, std::move(padding), activation, y);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("conv_bn_act.native", TORCH_BOX(&conv));
  m.impl("conv_bn_act.native_out", TORCH_BOX(&conv_out));
}

}  // namespace
}  // namespace effnet_fast::binding
