// effnet_fast::pointwise_conv_bn_act.native. The schema is in effnet_fast/ops/pointwise.
#include "../pointwise/params.h"

#include "conv.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kPointwise = "pointwise_conv_bn_act";

void pointwise_out(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                   const Tensor& norm_mean, const Tensor& norm_var, double norm_eps, const OptionalTensor& gate,
                   const OptionalTensor& residual, const std::string& activation, const Tensor& y) {
  check(x.dim() == 4, kPointwise, ": x has shape ", shape_text(x), ", expected [N, C, H, W]");
  check(weight.dim() == 4, kPointwise, ": weight has shape ", shape_text(weight), ", expected [K, C, 1, 1]");
  const int64_t images = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3), out = weight.size(0);
  constexpr int64_t limit = std::numeric_limits<int>::max() / 64;
  check(in >= 1 && in < limit && out >= 1 && out < limit, kPointwise, ": C and K must be at least 1 and below 2^25, got C=", in,
        ", K=", out);
  const auto dtype = [&](const char* name, const Tensor& t) { return dtype_of(kPointwise, name, t); };
  const auto checked = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) -> const Tensor& {
    check_shape(kPointwise, name, t, shape);
    check_same_device(kPointwise, name, t, x);
    return t;
  };

  pointwise::Params p{};
  p.dtype = dtype("x", x);
  const Tensor inputs = as_channels_last(x);
  const ConvTensors t = conv_tensors(kPointwise, x, checked("weight", weight, {out, in, 1, 1}),
                                     {norm_weight, norm_bias, norm_mean, norm_var, norm_eps});
  OptionalTensor gates, residuals;
  if (gate) {
    check(dtype("gate", *gate) == DType::fp32, kPointwise, ": gate must be float32");
    gates = as_contiguous(checked("gate", *gate, {images, in}));
  }
  if (residual) {
    check(dtype("residual", *residual) == p.dtype, kPointwise, ": residual must have the dtype of x");
    residuals = as_channels_last(checked("residual", *residual, {images, out, height, width}));
  }
  check(is_channels_last(checked("y", y, {images, out, height, width})), kPointwise, ": y must be channels_last");
  check(dtype("y", y) == p.dtype, kPointwise, ": y must have the dtype of x");

  p.x = inputs.const_data_ptr();
  p.weight = t.weight.const_data_ptr();
  p.norm_weight = data_or_null(t.norm.weight);
  p.norm_bias = data_or_null(t.norm.bias);
  p.norm_mean = t.norm.mean.const_data_ptr();
  p.norm_var = t.norm.var.const_data_ptr();
  p.weight_dtype = t.weight_dtype;
  p.norm_dtype = t.norm_dtype;
  p.gate = static_cast<const float*>(data_or_null(gates));
  p.residual = data_or_null(residuals);
  p.y = y.mutable_data_ptr();
  p.rows = images * height * width;
  p.pixels = height * width;
  p.in_channels = int(in);
  p.out_channels = int(out);
  p.norm_eps = float(norm_eps);
  p.activation = activation_of(kPointwise, activation);
  if (p.rows > 0) pointwise::conv_bn_act_cpu(p);
}

Tensor pointwise_made(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                      const Tensor& norm_mean, const Tensor& norm_var, double norm_eps, const OptionalTensor& gate,
                      const OptionalTensor& residual, const std::string& activation) {
  check(x.dim() == 4, kPointwise, ": x has shape ", shape_text(x), ", expected [N, C, H, W]");
  check(weight.dim() == 4, kPointwise, ": weight has shape ", shape_text(weight), ", expected [K, C, 1, 1]");
  Tensor y = torch::stable::empty({x.size(0), weight.size(0), x.size(2), x.size(3)}, x.scalar_type(), std::nullopt, x.device(),
                                  std::nullopt, MemoryFormat::ChannelsLast);
  if (y.is_cpu()) advise_huge_pages(y);
  pointwise_out(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, gate, residual, activation, y);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("pointwise_conv_bn_act.native", TORCH_BOX(&pointwise_made));
  m.impl("pointwise_conv_bn_act.native_out", TORCH_BOX(&pointwise_out));
}

}  // namespace
}  // namespace effnet_fast::binding
