// effnet_fast::conv_bn_act.native. The schema is in effnet_fast/ops/conv.
#include "../conv/params.h"

#include "../inference/plan.h"
#include "chain.h"
#include "conv.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kConv = "conv_bn_act";

// Of the result: of bytes, it has the weight's.
ScalarType result_dtype(const Tensor& x, const Tensor& weight, const OptionalTensor& pixels) {
  return pixels ? weight.scalar_type() : x.scalar_type();
}

void run_cpu(const conv::Params& p, const Tensor&, const OptionalTensor&) {
  const int64_t columns = p.out_width == 1 ? 0 : (int64_t(p.out_width) + 8) * p.stride;
  const int64_t row = (std::max(int64_t(p.width) + p.pad_left, columns) + p.kernel + 8) * p.in_channels;
  check(p.kernel * row <= std::numeric_limits<int>::max(), kConv, ": the rows under an output row are larger than 2^31 floats");
  inference::call(p, conv::conv_cpu);
}

#ifdef EFFNET_FAST_CUDA
// The kernel adds and writes 16 bytes at a time.
void run_cuda(conv::Params& p, const Tensor& x, const OptionalTensor& residual) {
  check(p.kernel == 3 && p.stride == 2 && p.in_channels <= 4, kConv, ": the CUDA kernel takes a stem's window, 3x3 of at most 4 ",
        "channels with stride 2, got ", p.kernel, "x", p.kernel, " of ", p.in_channels, " with stride ", p.stride);
  check(p.channels % 8 == 0, kConv, ": the CUDA kernel makes a multiple of 8 channels, got ", p.channels);
  check(p.dtype != DType::fp32, kConv, ": the CUDA kernel makes bfloat16 or float16");
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  check(aligned(p.y), kConv, ": y must start at a multiple of 16 bytes");
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  OptionalTensor copy;
  if (!aligned(p.residual)) {
    copy = on_16_bytes(*residual);
    p.residual = copy->const_data_ptr();
  }
  start(p, conv::forward_cuda, device);
}
#endif

template <auto run> void conv_out(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight,
                                  const OptionalTensor& norm_bias, const Tensor& norm_mean, const Tensor& norm_var, double norm_eps,
                                  const OptionalTensor& residual, int64_t stride, std::vector<int64_t> padding,
                                  const Text& activation, const OptionalTensor& pixels, const Tensor& y) {
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
  const ConvTensors t = conv_tensors(kConv, x, weight, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps});
  auto p = conv_params<conv::Params>(kConv, x, t, stride, padding, activation, shape, y,
                                     pixels ? dtype_of(kConv, "weight", weight) : dtype_of(kConv, "x", x));
  p.pixels = static_cast<const float*>(data_or_null(table));
  p.x_channel = x.stride(1);
  p.in_channels = int(x.size(1));
  p.residual = data_or_null(added);
  if (p.batch > 0) run(p, x, added);
}

template <auto run> Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight,
                                const OptionalTensor& norm_bias, const Tensor& norm_mean, const Tensor& norm_var, double norm_eps,
                                const OptionalTensor& residual, int64_t stride, std::vector<int64_t> padding,
                                const Text& activation, const OptionalTensor& pixels) {
  const Tensor y = empty_output(x, conv_shape(kConv, x, weight, stride, padding), result_dtype(x, weight, pixels));
  conv_out<run>(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, residual, stride, std::move(padding), activation,
                pixels, y);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("conv_bn_act.native", TORCH_BOX(&conv<run_cpu>));
  m.impl("conv_bn_act.native_out", TORCH_BOX(&conv_out<run_cpu>));
}

#ifdef EFFNET_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CUDA, m) {
  m.impl("conv_bn_act.native", TORCH_BOX(&conv<run_cuda>));
  m.impl("conv_bn_act.native_out", TORCH_BOX(&conv_out<run_cuda>));
}
#endif

}  // namespace
}  // namespace effnet_fast::binding
