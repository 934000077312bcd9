// effnet_fast::depthwise_conv_bn_act.native. The schema is in effnet_fast/ops/depthwise.
#include "../depthwise/params.h"

#include "../inference/plan.h"
#include "chain.h"
#include "conv.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kDepthwise = "depthwise_conv_bn_act";

// The arguments of one call, checked; run(params, x, weight) writes y and partial.
template <typename Run> void write_depthwise(const Tensor& x, const Tensor& weight, const NormTensors& norm, int64_t stride,
                                             const std::vector<int64_t>& padding, const Text& activation, int64_t pieces,
                                             const Tensor& y, const Tensor& partial, const Run& run) {
  const ConvShape shape = conv_shape(kDepthwise, x, weight, stride, padding);
  check(weight.size(0) == x.size(1) && weight.size(1) == 1, kDepthwise, ": weight has shape ", shape_text(weight), ", expected [",
        x.size(1), ", 1, k, k]");
  check(shape.kernel == 3 || shape.kernel == 5, kDepthwise, ": the kernel must be 3x3 or 5x5, got ", shape.kernel, "x",
        shape.kernel);
  check(stride == 1 || stride == 2, kDepthwise, ": stride must be 1 or 2, got ", stride);
  check_output(kDepthwise, "y", y, x, shape, x.scalar_type());
  check(pieces >= 0, kDepthwise, ": pieces must not be negative, got ", pieces);
  check_shape(kDepthwise, "partial", partial, {x.size(0), pieces, x.size(1)});
  check_same_device(kDepthwise, "partial", partial, x);
  check_apart(kDepthwise, "partial", partial, x);
  check(partial.scalar_type() == ScalarType::Float && partial.is_contiguous(), kDepthwise, ": partial must be contiguous float32");

  const Tensor input = x.stride(1) == 1 || x.size(1) == 1 ? x : in_channels_last(x);
  const ConvTensors t = conv_tensors(kDepthwise, x, weight, norm);
  auto p = conv_params<depthwise::ForwardParams>(kDepthwise, input, t, stride, padding, activation, shape, y,
                                                 dtype_of(kDepthwise, "x", x));
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  p.pieces = int(pieces);
  if (p.batch > 0) run(p, input, t.weight);
}

void run_cpu(const depthwise::ForwardParams& p, const Tensor&, const Tensor&) { inference::call(p, depthwise::forward_cpu); }

#ifdef EFFNET_FAST_CUDA
bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The tensor cores' kernel moves 16 bytes at a time. What does not lie so is copied first: a view at an odd place, which is rare.
void run_cuda(depthwise::ForwardParams& p, const Tensor& x, const Tensor& weight) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor input = x, taps = weight;
  // A side of one pixel is never stepped over: its stride says nothing.
  const auto stride = [&](int64_t i) { return input.size(i) == 1 ? int64_t{0} : input.stride(i); };
  const bool on_tensor_cores = p.dtype != DType::fp32 && p.channels % 8 == 0;
  if (on_tensor_cores) {
    check(aligned(p.y, 16) && aligned(p.partial, 8), kDepthwise, ": y must start at a multiple of 16 bytes, partial of 8");
    if (stride(0) % 8 || stride(2) % 8 || stride(3) % 8) input = in_channels_last(input);
    if (!aligned(input.const_data_ptr(), 16)) {  // perhaps channels_last already, so that contiguous would return it as it is
      before_other_kernels();
      const Tensor copy = torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), std::nullopt,
                                               x.device(), std::nullopt, MemoryFormat::ChannelsLast);
      input = torch::stable::copy_(const_cast<Tensor&>(copy), input);
    }
  }
  taps = on_16_bytes(taps);
  p.x = input.const_data_ptr();
  p.x_image = stride(0);
  p.x_row = stride(2);
  p.x_pixel = stride(3);
  p.weight = taps.const_data_ptr();
  start(p, depthwise::forward_cuda, device);
}
#endif

template <auto run> void depthwise_out(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight,
                                       const OptionalTensor& norm_bias, const Tensor& norm_mean, const Tensor& norm_var,
                                       double norm_eps, int64_t stride, std::vector<int64_t> padding, const Text& activation,
                                       int64_t pieces, const Tensor& y, const Tensor& partial) {
  write_depthwise(x, weight, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps}, stride, padding, activation, pieces, y,
                  partial, run);
}

template <auto run> std::tuple<Tensor, Tensor> depthwise(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight,
                                                         const OptionalTensor& norm_bias, const Tensor& norm_mean,
                                                         const Tensor& norm_var, double norm_eps, int64_t stride,
                                                         std::vector<int64_t> padding, const Text& activation, int64_t pieces) {
  const Tensor y = empty_output(x, conv_shape(kDepthwise, x, weight, stride, padding), x.scalar_type());
  check(pieces >= 0, kDepthwise, ": pieces must not be negative, got ", pieces);
  const Tensor partial = torch::stable::new_empty(x, {x.size(0), pieces, x.size(1)}, ScalarType::Float);
  write_depthwise(x, weight, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps}, stride, padding, activation, pieces, y,
                  partial, run);
  return {y, partial};
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("depthwise_conv_bn_act.native", TORCH_BOX(&depthwise<run_cpu>));
  m.impl("depthwise_conv_bn_act.native_out", TORCH_BOX(&depthwise_out<run_cpu>));
}

#ifdef EFFNET_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CUDA, m) {
  m.impl("depthwise_conv_bn_act.native", TORCH_BOX(&depthwise<run_cuda>));
  m.impl("depthwise_conv_bn_act.native_out", TORCH_BOX(&depthwise_out<run_cuda>));
}
#endif

}  // namespace
}  // namespace effnet_fast::binding
