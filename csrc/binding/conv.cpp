// effnet_fast::conv_bn_act.native. The schema is in effnet_fast/ops/conv.
#include "../conv/params.h"

#include "../inference/plan.h"
#include "conv.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kConv = "conv_bn_act";

// Of the result: of bytes, it has the weight's.
ScalarType result_dtype(const Tensor& x, const Tensor& weight, const OptionalTensor& pixels) {
  return pixels ? weight.scalar_type() : x.scalar_type();
}

void conv_out(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
              const Tensor& norm_mean, const Tensor& norm_var, double norm_eps, const OptionalTensor& residual, int64_t stride,
              std::vector<int64_t> padding, const std::string& activation, const OptionalTensor& pixels, const Tensor& y) {
  const ConvShape shape = conv_shape(kConv, x, weight, stride, padding);
  check(weight.size(1) == x.size(1), kConv, ": weight has shape ", shape_text(weight), ", expected [K, ", x.size(1), ", k, k]");
  const ScalarType dtype = result_dtype(x, weight, pixels);
  check_output(kConv, "y", y, x, shape, dtype);
  OptionalTensor table, added;
  if (pixels) {
    check(x.scalar_type() == ScalarType::Byte, kConv, ": x must be uint8 beside pixels");
    check_shape(kConv, "pixels", *pixels, {2, x.size(1)});
    check_same_device(kConv, "pixels", *pixels, x);
    check(pixels->scalar_type() == ScalarType::Float, kConv, ": pixels must be float32");
    table = as_contiguous(*pixels);
  }
  if (residual) {
    check_shape(kConv, "residual", *residual, {x.size(0), shape.out_channels, shape.out_height, shape.out_width});
    check_same_device(kConv, "residual", *residual, x);
    check(residual->scalar_type() == dtype, kConv, ": residual must have the result's dtype");
    added = as_channels_last(*residual);
  }
  check_apart(kConv, "y", y, residual);
  const int64_t columns = shape.out_width == 1 ? 0 : (shape.out_width + 8) * stride;
  const int64_t row = (std::max(x.size(3) + padding[2], columns) + shape.kernel + 8) * x.size(1);
  check(shape.kernel * row <= std::numeric_limits<int>::max(), kConv, ": the rows under an output row are larger than 2^31 floats");
  const ConvTensors t = conv_tensors(kConv, x, weight, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps});
  auto p = conv_params<conv::Params>(kConv, x, t, stride, padding, activation, shape, y,
                                     pixels ? dtype_of(kConv, "weight", weight) : dtype_of(kConv, "x", x));
  p.pixels = static_cast<const float*>(data_or_null(table));
  p.x_channel = x.stride(1);
  p.in_channels = int(x.size(1));
  p.residual = data_or_null(added);
  if (p.batch > 0) inference::call(p, conv::conv_cpu);
}

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
            const Tensor& norm_mean, const Tensor& norm_var, double norm_eps, const OptionalTensor& residual, int64_t stride,
            std::vector<int64_t> padding, const std::string& activation, const OptionalTensor& pixels) {
  const Tensor y = empty_output(x, conv_shape(kConv, x, weight, stride, padding), result_dtype(x, weight, pixels));
  conv_out(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, residual, stride, std::move(padding), activation,
           pixels, y);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("conv_bn_act.native", TORCH_BOX(&conv));
  m.impl("conv_bn_act.native_out", TORCH_BOX(&conv_out));
}

}  // namespace
}  // namespace effnet_fast::binding
