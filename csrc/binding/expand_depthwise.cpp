// effnet_fast::expand_depthwise_conv_bn_act.native. The schema is in effnet_fast/ops/expand_depthwise.
#include "../expand_depthwise/params.h"

#include "chain.h"
#include "conv.h"

#ifdef EFFNET_FAST_CUDA
namespace effnet_fast::binding {
namespace {

constexpr const char* kOp = "expand_depthwise_conv_bn_act";

void expand_depthwise_out(const Tensor& x, const Tensor& expand_weight, const OptionalTensor& expand_norm_weight,
                          const OptionalTensor& expand_norm_bias, const Tensor& expand_norm_mean, const Tensor& expand_norm_var,
                          double expand_norm_eps, const Tensor& weight, const OptionalTensor& norm_weight,
                          const OptionalTensor& norm_bias, const Tensor& norm_mean, const Tensor& norm_var, double norm_eps,
                          int64_t stride, std::vector<int64_t> padding, const Text& activation, int64_t pieces, const Tensor& y,
                          const Tensor& partial) {
  const ConvShape shape = conv_shape(kOp, x, weight, stride, padding);
  check(weight.size(1) == 1, kOp, ": weight has shape ", shape_text(weight), ", expected [K, 1, k, k]");
  check_shape(kOp, "expand_weight", expand_weight, {shape.out_channels, x.size(1), 1, 1});
  check_output(kOp, "y", y, x, shape, x.scalar_type());
  check(pieces >= 0, kOp, ": pieces must not be negative, got ", pieces);
  check_shape(kOp, "partial", partial, {x.size(0), pieces, shape.out_channels});
  check_same_device(kOp, "partial", partial, x);
  check_apart(kOp, "partial", partial, x);
  check(partial.scalar_type() == ScalarType::Float && partial.is_contiguous(), kOp, ": partial must be contiguous float32");

  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor input = on_16_bytes(as_channels_last(x));
  ConvTensors t = conv_tensors(kOp, x, weight, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps});
  ConvTensors e = conv_tensors(kOp, x, expand_weight,
                               {expand_norm_weight, expand_norm_bias, expand_norm_mean, expand_norm_var, expand_norm_eps},
                               {"expand_weight", "expand_norm_weight", "expand_norm_bias", "expand_norm_mean", "expand_norm_var"});
  t.weight = on_16_bytes(t.weight);
  e.weight = on_16_bytes(e.weight);
  auto p =
      conv_params<expand_depthwise::ForwardParams>(kOp, input, t, stride, padding, activation, shape, y, dtype_of(kOp, "x", x));
  check(p.dtype != DType::fp32, kOp, ": the CUDA kernel takes x of bfloat16 or float16");
  set_parameters(p.expand, e);
  p.expand.in_channels = int(x.size(1));
  p.x_pixel = p.expand.in_channels;  // strides of sides of one pixel say nothing
  p.x_row = p.x_pixel * p.width;
  p.x_image = p.x_row * p.height;
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  p.pieces = int(pieces);
  check(aligned16(p.y) && reinterpret_cast<uintptr_t>(p.partial) % 8 == 0, kOp,
        ": y must start at a multiple of 16 bytes, partial of 8");
  if (p.batch > 0) start(p, expand_depthwise::forward_cuda, device);
}

std::tuple<Tensor, Tensor> expand_depthwise_made(const Tensor& x, const Tensor& expand_weight,
                                                 const OptionalTensor& expand_norm_weight, const OptionalTensor& expand_norm_bias,
                                                 const Tensor& expand_norm_mean, const Tensor& expand_norm_var,
                                                 double expand_norm_eps, const Tensor& weight, const OptionalTensor& norm_weight,
                                                 const OptionalTensor& norm_bias, const Tensor& norm_mean, const Tensor& norm_var,
                                                 double norm_eps, int64_t stride, std::vector<int64_t> padding,
                                                 const Text& activation, int64_t pieces) {
  const ConvShape shape = conv_shape(kOp, x, weight, stride, padding);
  const Tensor y = empty_output(x, shape, x.scalar_type());
  check(pieces >= 0, kOp, ": pieces must not be negative, got ", pieces);
  const Tensor partial = torch::stable::new_empty(x, {x.size(0), pieces, shape.out_channels}, ScalarType::Float);
  expand_depthwise_out(x, expand_weight, expand_norm_weight, expand_norm_bias, expand_norm_mean, expand_norm_var, expand_norm_eps,
                       weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, stride, padding, activation, pieces, y,
                       partial);
  return {y, partial};
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CUDA, m) {
  m.impl("expand_depthwise_conv_bn_act.native", TORCH_BOX(&expand_depthwise_made));
  m.impl("expand_depthwise_conv_bn_act.native_out", TORCH_BOX(&expand_depthwise_out));
}

}  // namespace
}  // namespace effnet_fast::binding
#endif
