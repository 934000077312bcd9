// effnet_fast::pointwise_conv_bn_act.native. The schema is in effnet_fast/ops/pointwise.
#include "../pointwise/params.h"

#include "../inference/plan.h"
#include "chain.h"
#include "conv.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kPointwise = "pointwise_conv_bn_act";

// Checks x [N, C, H, W] and weight [K, C, 1, 1].
ConvShape pointwise_shape(const Tensor& x, const Tensor& weight) {
  const ConvShape shape = conv_shape(kPointwise, x, weight, 1, {0, 0, 0, 0});
  check(weight.size(1) == x.size(1) && shape.kernel == 1, kPointwise, ": weight has shape ", shape_text(weight), ", expected [K, ",
        x.size(1), ", 1, 1]");
  return shape;
}

void run_cpu(const pointwise::Params& p, const Tensor&) { inference::call(p, pointwise::conv_bn_act_cpu); }

#ifdef EFFNET_FAST_CUDA
void run_cuda(const pointwise::Params& p, const Tensor& x) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check(p.dtype != DType::fp32, kPointwise, ": the CUDA kernel takes x of bfloat16 or float16");
  check(aligned16(p.y), kPointwise, ": y must start at a multiple of 16 bytes");
  start(p, pointwise::forward_cuda, device);
}
#endif

template <auto run> void pointwise_out(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight,
                                       const OptionalTensor& norm_bias, const Tensor& norm_mean, const Tensor& norm_var,
                                       double norm_eps, const OptionalTensor& gate, const OptionalTensor& residual,
                                       const Text& activation, const Tensor& y) {
  const ConvShape shape = pointwise_shape(x, weight);
  const int64_t images = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3), out = shape.out_channels;
  check_output(kPointwise, "y", y, x, shape, x.scalar_type());
  const auto checked = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) -> const Tensor& {
    check_shape(kPointwise, name, t, shape);
    check_same_device(kPointwise, name, t, x);
    return t;
  };

  pointwise::Params p{};
  p.dtype = dtype_of(kPointwise, "x", x);
  const Tensor inputs = on_16_bytes(as_channels_last(x));
  ConvTensors t = conv_tensors(kPointwise, x, weight, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps});
  t.weight = on_16_bytes(t.weight);
  OptionalTensor gates, residuals;
  if (gate) {
    check(gate->scalar_type() == ScalarType::Float, kPointwise, ": gate must be float32");
    gates = on_16_bytes(as_contiguous(checked("gate", *gate, {images, in})));
  }
  if (residual) {
    check(residual->scalar_type() == x.scalar_type(), kPointwise, ": residual must have the dtype of x");
    residuals = on_16_bytes(as_channels_last(checked("residual", *residual, {images, out, height, width})));
  }
  check_apart(kPointwise, "y", y, residual);
  check_apart(kPointwise, "y", y, gate);

  p.x = inputs.const_data_ptr();
  set_parameters(p, t);
  p.gate = static_cast<const float*>(data_or_null(gates));
  p.residual = data_or_null(residuals);
  p.y = y.mutable_data_ptr();
  p.rows = images * height * width;
  p.pixels = height * width;
  p.in_channels = int(in);
  p.out_channels = int(out);
  p.y_row = out;
  p.activation = activation_of(kPointwise, activation);
  if (p.rows > 0) run(p, x);
}

template <auto run> Tensor pointwise_made(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight,
                                          const OptionalTensor& norm_bias, const Tensor& norm_mean, const Tensor& norm_var,
                                          double norm_eps, const OptionalTensor& gate, const OptionalTensor& residual,
                                          const Text& activation) {
  const Tensor y = empty_output(x, pointwise_shape(x, weight), x.scalar_type());
  pointwise_out<run>(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, gate, residual, activation, y);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("pointwise_conv_bn_act.native", TORCH_BOX(&pointwise_made<run_cpu>));
  m.impl("pointwise_conv_bn_act.native_out", TORCH_BOX(&pointwise_out<run_cpu>));
}
#ifdef EFFNET_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CUDA, m) {
  m.impl("pointwise_conv_bn_act.native", TORCH_BOX(&pointwise_made<run_cuda>));
  m.impl("pointwise_conv_bn_act.native_out", TORCH_BOX(&pointwise_out<run_cuda>));
}
#endif

}  // namespace
}  // namespace effnet_fast::binding
