// Training's ops for the CPU, and those of depthwise and pointwise convolutions for CUDA. The schemas are in
// effnet_fast/ops/training.
#include "../training/params.h"

#include "conv.h"

namespace effnet_fast::binding {
namespace {

using Sides = std::vector<int64_t>;

// Tensors as the kernels read them, alive for a call.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& x) : op_(op), x_(x) {
    check(x.dim() == 4, op, ": x has shape ", shape_text(x), ", expected [N, C, H, W]");
    constexpr int64_t limit = std::numeric_limits<int>::max() / 64;
    for (int64_t i = 0; i < 4; ++i)
      check(x.size(i) >= 1 && x.size(i) < limit, op, ": x has shape ", shape_text(x), ", expected sizes from 1 to 2^25");
    dtype = dtype_of(op, "x", x);
  }

  // [N, C, H, W] of x's dtype, as channels_last.
  const void* images(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    check_shape(op_, name, t, shape);
    check_same_device(op_, name, t, x_);
    check(t.scalar_type() == x_.scalar_type(), op_, ": ", name, " must have the dtype of x");
    return keep(as_channels_last(t));
  }
  const void* images_or_null(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) {
    return t ? images(name, *t, shape) : nullptr;
  }
  const void* x() { return keep(as_channels_last(x_)); }

  const float* vectors(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) {
    if (!t) return nullptr;
    check_shape(op_, name, *t, shape);
    check_same_device(op_, name, *t, x_);
    check(t->scalar_type() == ScalarType::Float, op_, ": ", name, " must be float32");
    return static_cast<const float*>(keep(as_contiguous(*t)));
  }

  const void* weight(const Tensor& t) {
    check_same_device(op_, "weight", t, x_);
    return keep(as_parameter(t));
  }

  training::Read read(const OptionalTensor& norm, const Text& activation, const OptionalTensor& gate) {
    const int64_t channels = x_.size(1);
    check(norm || (!gate && activation == "identity"), op_, ": norm is None beside an activation or a gate");
    return {x(), vectors("norm", norm, {3, channels}), vectors("gate", gate, {x_.size(0), channels}),
            activation_of(op_, activation)};
  }

  DType dtype;

 private:
  const void* keep(const Tensor& t) {
    kept_.push_back(on_16_bytes(t));
    return kept_.back().const_data_ptr();
  }
  const char* op_;
  const Tensor& x_;
  std::vector<Tensor> kept_;
};

DType stored(const char* op, const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? DType::fp32 : dtype_of(op, "weight", weight);
}

struct IsPointwise {
  static constexpr const char *stats = "pointwise_conv_stats", *backward = "pointwise_conv_backward";
  static ConvShape shape(const char* op, const Tensor& x, const Tensor& weight, int64_t stride, const Sides& padding) {
    const ConvShape shape = conv_shape(op, x, weight, stride, padding);
    check(weight.size(1) == x.size(1) && shape.kernel == 1 && stride == 1 && shape.out_height == x.size(2) &&
              shape.out_width == x.size(3),
          op, ": weight has shape ", shape_text(weight), ", expected [K, ", x.size(1), ", 1, 1], with stride 1 and no padding");
    return shape;
  }
  static training::Pointwise params(const char* op, Arguments& a, const training::Read& read, const Tensor& x, const Tensor& weight,
                                    int64_t, const Sides&, const ConvShape& shape) {
    return {read,           a.weight(weight),        x.size(0), x.size(2) * x.size(3),
            int(x.size(1)), int(shape.out_channels), a.dtype,   stored(op, weight)};
  }
  static void run(const training::Pointwise& p, const training::Stats& made, const Tensor&) {
    training::pointwise_stats_cpu(p, made);
  }
  static void run(const training::Pointwise& p, const training::Gradients& made, const Tensor&) {
    training::pointwise_backward_cpu(p, made);
  }
};

struct IsDepthwise {
  static constexpr const char *stats = "depthwise_conv_stats", *backward = "depthwise_conv_backward";
  static ConvShape shape(const char* op, const Tensor& x, const Tensor& weight, int64_t stride, const Sides& padding) {
    const ConvShape shape = conv_shape(op, x, weight, stride, padding);
    check(weight.size(0) == x.size(1) && weight.size(1) == 1, op, ": weight has shape ", shape_text(weight), ", expected [",
          x.size(1), ", 1, k, k]");
    check(shape.kernel == 3 || shape.kernel == 5, op, ": the kernel must be 3x3 or 5x5, got ", shape.kernel, "x", shape.kernel);
    check(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
    return shape;
  }
  static training::Depthwise params(const char* op, Arguments& a, const training::Read& read, const Tensor& x, const Tensor& weight,
                                    int64_t stride, const Sides& padding, const ConvShape& shape) {
    check(!read.gate, op, ": gate is given; a depthwise convolution takes none");
    return {read,           a.weight(weight),  x.size(0),        int(x.size(1)),
            int(x.size(2)), int(x.size(3)),    shape.out_height, shape.out_width,
            shape.kernel,   int(stride),       int(padding[0]),  int(padding[2]),
            a.dtype,        stored(op, weight)};
  }
  static void run(const training::Depthwise& p, const training::Stats& made, const Tensor&) {
    training::depthwise_stats_cpu(p, made);
  }
  static void run(const training::Depthwise& p, const training::Gradients& made, const Tensor&) {
    training::depthwise_backward_cpu(p, made);
  }
};

#ifdef EFFNET_FAST_CUDA
// Calls start(allocate, stream) on x's device. torch's allocator hands memory out again in the order of the stream, so it may end
// before the kernels do.
template <typename F> void on_device_of(const Tensor& x, const F& start) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<Tensor> kept;
  const training::Allocate allocate = [&](int64_t floats) {
    kept.push_back(torch::stable::new_empty(x, {floats}, ScalarType::Float));
    return static_cast<float*>(kept.back().mutable_data_ptr());
  };
  start(allocate, current_cuda_stream(device));
}

struct IsDepthwiseCuda : IsDepthwise {
  static void run(const training::Depthwise& p, const training::Stats& made, const Tensor& x) {
    on_device_of(x, [&](const auto& allocate, void* stream) { training::depthwise_stats_cuda(p, made, allocate, stream); });
  }
  static void run(const training::Depthwise& p, const training::Gradients& made, const Tensor& x) {
    on_device_of(x, [&](const auto& allocate, void* stream) { training::depthwise_backward_cuda(p, made, allocate, stream); });
  }
};

struct IsPointwiseCuda : IsPointwise {
  // Of another type, as training's parameters are beside halves, the forward would round it once a block; the backward takes x's.
  static training::Pointwise params(const char* op, Arguments& a, const training::Read& read, const Tensor& x, const Tensor& weight,
                                    int64_t stride, const Sides& padding, const ConvShape& shape) {
    check_same_device(op, "weight", weight, x);
    const Tensor rounded = torch::stable::to(weight, x.scalar_type());
    return IsPointwise::params(op, a, read, x, rounded, stride, padding, shape);
  }
  static void run(const training::Pointwise& p, const training::Stats& made, const Tensor& x) {
    check(p.dtype != DType::fp32, stats, ": the CUDA kernel takes x of bfloat16 or float16");
    check(aligned16(made.y), stats, ": y must start at a multiple of 16 bytes");
    on_device_of(x, [&](const auto& allocate, void* stream) { training::pointwise_stats_cuda(p, made, allocate, stream); });
  }
  static void run(const training::Pointwise& p, const training::Gradients& made, const Tensor& x) {
    check(p.dtype != DType::fp32, backward, ": the CUDA kernel takes x of bfloat16 or float16");
    check(aligned16(made.grad_x), backward, ": grad_x must start at a multiple of 16 bytes");
    on_device_of(x, [&](const auto& allocate, void* stream) { training::pointwise_backward_cuda(p, made, allocate, stream); });
  }
};
#endif

// Throws where a result shares memory with another, or with what is read.
void check_all_apart(const char* op, std::initializer_list<std::pair<const char*, Tensor>> results,
                     std::initializer_list<OptionalTensor> read) {
  for (auto result = results.begin(); result != results.end(); ++result) {
    for (const OptionalTensor& t : read) check_apart(op, result->first, result->second, t);
    for (auto other = results.begin(); other != result; ++other)
      check_apart(op, result->first, result->second, OptionalTensor(other->second));
  }
}

void check_vector(const char* op, const char* name, const Tensor& t, const Tensor& x, std::initializer_list<int64_t> shape) {
  check_shape(op, name, t, shape);
  check_same_device(op, name, t, x);
  check_apart(op, name, t, x);
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, ": ", name, " must be contiguous float32");
}

template <typename Kind> void stats_out(const Tensor& x, const Tensor& weight, const OptionalTensor& norm, const Text& activation,
                                        const OptionalTensor& gate, int64_t stride, Sides padding, const Tensor& y,
                                        const Tensor& mean, const Tensor& var) {
  Arguments a(Kind::stats, x);
  const ConvShape shape = Kind::shape(Kind::stats, x, weight, stride, padding);
  check_output(Kind::stats, "y", y, x, shape, x.scalar_type());
  check_vector(Kind::stats, "mean", mean, x, {shape.out_channels});
  check_vector(Kind::stats, "var", var, x, {shape.out_channels});
  check_all_apart(Kind::stats, {{"y", y}, {"mean", mean}, {"var", var}}, {x, weight, norm, gate});
  const training::Read read = a.read(norm, activation, gate);
  Kind::run(Kind::params(Kind::stats, a, read, x, weight, stride, padding, shape),
            training::Stats{y.mutable_data_ptr(), static_cast<float*>(mean.mutable_data_ptr()),
                            static_cast<float*>(var.mutable_data_ptr())},
            x);
}

template <typename Kind> std::tuple<Tensor, Tensor, Tensor> stats(const Tensor& x, const Tensor& weight, const OptionalTensor& norm,
                                                                  const Text& activation, const OptionalTensor& gate,
                                                                  int64_t stride, Sides padding) {
  const ConvShape shape = Kind::shape(Kind::stats, x, weight, stride, padding);
  const Tensor y = empty_output(x, shape, x.scalar_type());
  const Tensor mean = torch::stable::new_empty(x, {shape.out_channels}, ScalarType::Float);
  const Tensor var = torch::stable::new_empty(x, {shape.out_channels}, ScalarType::Float);
  stats_out<Kind>(x, weight, norm, activation, gate, stride, std::move(padding), y, mean, var);
  return {y, mean, var};
}

template <typename Kind> void backward_out(const Tensor& grad, const Tensor& y, const Tensor& y_norm, const Tensor& y_coefficients,
                                           const Text& y_activation, const OptionalTensor& y_gate, const OptionalTensor& y_pool,
                                           const Tensor& x, const Tensor& weight, const OptionalTensor& norm,
                                           const Text& activation, const OptionalTensor& gate, const OptionalTensor& residual,
                                           int64_t stride, Sides padding, bool need_x, bool need_weight, const Tensor& grad_x,
                                           const Tensor& grad_weight, const Tensor& sums) {
  const char* op = Kind::backward;
  Arguments a(op, x);
  const ConvShape shape = Kind::shape(op, x, weight, stride, padding);
  const int64_t images = x.size(0), channels = x.size(1), out = shape.out_channels;
  if (need_x) {
    check_shape(op, "grad_x", grad_x, {images, channels, x.size(2), x.size(3)});
    check_same_device(op, "grad_x", grad_x, x);
    check(grad_x.scalar_type() == x.scalar_type() && is_channels_last(grad_x), op, ": grad_x must be channels_last in x's dtype");
    if (gate)
      check_vector(op, "sums", sums, x, {images, 5, channels});
    else if (norm)
      check_vector(op, "sums", sums, x, {2, channels});
  }
  Tensor made_weight = grad_weight;
  if (need_weight) {
    check_shape(op, "grad_weight", grad_weight, {out, weight.size(1), weight.size(2), weight.size(3)});
    check_same_device(op, "grad_weight", grad_weight, x);
    check(grad_weight.scalar_type() == weight.scalar_type() && grad_weight.is_contiguous(), op,
          ": grad_weight must be contiguous in weight's dtype");
    if (weight.scalar_type() != ScalarType::Float)
      made_weight = torch::stable::new_empty(weight, {out, weight.size(1), weight.size(2), weight.size(3)}, ScalarType::Float);
  }
  check_all_apart(op, {{"grad_x", grad_x}, {"grad_weight", grad_weight}, {"sums", sums}},
                  {grad, y, y_norm, y_coefficients, y_gate, y_pool, x, weight, norm, gate, residual});
  const std::initializer_list<int64_t> y_shape = {images, out, shape.out_height, shape.out_width};
  const training::Read read = a.read(norm, activation, gate);
  const training::Gradients made{{a.images("grad", grad, y_shape), a.images("y", y, y_shape), a.vectors("y_norm", y_norm, {3, out}),
                                  a.vectors("y_coefficients", y_coefficients, {3, out}), a.vectors("y_gate", y_gate, {images, out}),
                                  a.vectors("y_pool", y_pool, {images, out}), activation_of(op, y_activation)},
                                 a.images_or_null("residual", residual, {images, channels, x.size(2), x.size(3)}),
                                 need_x ? grad_x.mutable_data_ptr() : nullptr,
                                 need_weight ? static_cast<float*>(made_weight.mutable_data_ptr()) : nullptr,
                                 need_x && norm ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr};
  Kind::run(Kind::params(op, a, read, x, weight, stride, padding, shape), made, x);
  if (need_weight && weight.scalar_type() != ScalarType::Float) torch::stable::copy_(const_cast<Tensor&>(grad_weight), made_weight);
}

template <typename Kind>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& y, const Tensor& y_norm, const Tensor& y_coefficients,
                                            const Text& y_activation, const OptionalTensor& y_gate, const OptionalTensor& y_pool,
                                            const Tensor& x, const Tensor& weight, const OptionalTensor& norm,
                                            const Text& activation, const OptionalTensor& gate, const OptionalTensor& residual,
                                            int64_t stride, Sides padding, bool need_x, bool need_weight) {
  check(x.dim() == 4 && weight.dim() == 4, Kind::backward, ": x has shape ", shape_text(x), " and weight ", shape_text(weight),
        ", expected four dimensions each");
  const ConvShape as_x{x.size(1), 1, int(x.size(2)), int(x.size(3))};
  const Tensor grad_x = need_x ? empty_output(x, as_x, x.scalar_type()) : torch::stable::new_empty(x, {0});
  const Tensor grad_weight =
      need_weight ? torch::stable::new_empty(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)})
                  : torch::stable::new_empty(weight, {0});
  const auto vectors = [&](std::initializer_list<int64_t> shape) { return torch::stable::new_empty(x, shape, ScalarType::Float); };
  const Tensor sums = !need_x || !norm ? vectors({0}) : gate ? vectors({x.size(0), 5, x.size(1)}) : vectors({2, x.size(1)});
  backward_out<Kind>(grad, y, y_norm, y_coefficients, y_activation, y_gate, y_pool, x, weight, norm, activation, gate, residual,
                     stride, std::move(padding), need_x, need_weight, grad_x, grad_weight, sums);
  return {grad_x, grad_weight, sums};
}

// --- passes over a raw result ------------------------------------------------------------------------------------------------

void check_images(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 4, op, ": ", name, " has shape ", shape_text(t), ", expected [N, C, H, W]");
}

training::Elements elements(Arguments& a, const Tensor& x, const OptionalTensor& norm, const Text& activation,
                            const OptionalTensor& gate) {
  return {a.read(norm, activation, gate), x.size(0), x.size(2) * x.size(3), int(x.size(1)), a.dtype};
}

// A result like x, checked: channels_last, apart from what is read.
void* result_like(const char* op, const char* name, const Tensor& made, const Tensor& x,
                  std::initializer_list<OptionalTensor> read) {
  check_output(op, name, made, x, {x.size(1), 1, int(x.size(2)), int(x.size(3))}, x.scalar_type());
  for (const OptionalTensor& t : read) check_apart(op, name, made, t);
  return made.mutable_data_ptr();
}
float* vector_result(const char* op, const char* name, const Tensor& made, const Tensor& x, std::initializer_list<int64_t> shape) {
  check_vector(op, name, made, x, shape);
  return static_cast<float*>(made.mutable_data_ptr());
}
Tensor made_like(const Tensor& x) { return empty_output(x, {x.size(1), 1, int(x.size(2)), int(x.size(3))}, x.scalar_type()); }
Tensor empty_vectors(const Tensor& x, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(x, shape, ScalarType::Float);
}
#define SHAPE_OF(x) {(x).size(0), (x).size(1), (x).size(2), (x).size(3)}

void norm_act_out(const Tensor& y, const Tensor& norm, const Text& activation, const OptionalTensor& gate,
                  const OptionalTensor& residual, const Tensor& out) {
  Arguments a("norm_act", y);
  void* made = result_like("norm_act", "out", out, y, {residual});
  const auto p = elements(a, y, norm, activation, gate);
  training::norm_act_cpu(p, a.images_or_null("residual", residual, SHAPE_OF(y)), made);
}

Tensor norm_act(const Tensor& y, const Tensor& norm, const Text& activation, const OptionalTensor& gate,
                const OptionalTensor& residual) {
  check_images("norm_act", "y", y);
  const Tensor out = made_like(y);
  norm_act_out(y, norm, activation, gate, residual, out);
  return out;
}

void norm_act_mean_out(const Tensor& y, const Tensor& norm, const Text& activation, const Tensor& mean) {
  Arguments a("norm_act_mean", y);
  float* made = vector_result("norm_act_mean", "mean", mean, y, {y.size(0), y.size(1)});
  training::norm_act_mean_cpu(elements(a, y, norm, activation, std::nullopt), made);
}

Tensor norm_act_mean(const Tensor& y, const Tensor& norm, const Text& activation) {
  check_images("norm_act_mean", "y", y);
  const Tensor mean = empty_vectors(y, {y.size(0), y.size(1)});
  norm_act_mean_out(y, norm, activation, mean);
  return mean;
}

void norm_act_sums_out(const Tensor& grad, const Tensor& y, const Tensor& norm, const Text& activation, const OptionalTensor& gate,
                       const Tensor& sums) {
  Arguments a("norm_act_sums", y);
  float* made = vector_result("norm_act_sums", "sums", sums, y, {2, y.size(1)});
  const void* of_out = a.images("grad", grad, SHAPE_OF(y));
  training::norm_act_sums_cpu(elements(a, y, norm, activation, gate), of_out, made);
}

Tensor norm_act_sums(const Tensor& grad, const Tensor& y, const Tensor& norm, const Text& activation, const OptionalTensor& gate) {
  check_images("norm_act_sums", "y", y);
  const Tensor sums = empty_vectors(y, {2, y.size(1)});
  norm_act_sums_out(grad, y, norm, activation, gate, sums);
  return sums;
}

void norm_act_image_sums_out(const Tensor& grad, const Tensor& x, const Tensor& norm, const Text& activation, const Tensor& sums) {
  Arguments a("norm_act_image_sums", x);
  float* made = vector_result("norm_act_image_sums", "sums", sums, x, {x.size(0), 5, x.size(1)});
  const void* of_out = a.images("grad", grad, SHAPE_OF(x));
  training::norm_act_image_sums_cpu(elements(a, x, norm, activation, std::nullopt), of_out, made);
}

Tensor norm_act_image_sums(const Tensor& grad, const Tensor& x, const Tensor& norm, const Text& activation) {
  check_images("norm_act_image_sums", "x", x);
  const Tensor sums = empty_vectors(x, {x.size(0), 5, x.size(1)});
  norm_act_image_sums_out(grad, x, norm, activation, sums);
  return sums;
}

void norm_act_backward_out(const Tensor& grad, const Tensor& x, const Tensor& norm, const Text& activation,
                           const OptionalTensor& residual, const Tensor& grad_x, const Tensor& sums) {
  const char* op = "norm_act_backward";
  Arguments a(op, x);
  void* made = result_like(op, "grad_x", grad_x, x, {grad, residual});
  float* made_sums = vector_result(op, "sums", sums, x, {2, x.size(1)});
  const void* of_out = a.images("grad", grad, SHAPE_OF(x));
  const void* added = a.images_or_null("residual", residual, SHAPE_OF(x));
  training::norm_act_backward_cpu(elements(a, x, norm, activation, std::nullopt), of_out, added, made, made_sums);
}

std::tuple<Tensor, Tensor> norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& norm, const Text& activation,
                                             const OptionalTensor& residual) {
  check_images("norm_act_backward", "x", x);
  const Tensor grad_x = made_like(x), sums = empty_vectors(x, {2, x.size(1)});
  norm_act_backward_out(grad, x, norm, activation, residual, grad_x, sums);
  return {grad_x, sums};
}

void norm_gradient_out(const Tensor& grad, const Tensor& y, const Tensor& norm, const Tensor& coefficients, const Text& activation,
                       const OptionalTensor& gate, const OptionalTensor& pool, const Tensor& grad_y) {
  const char* op = "norm_gradient";
  Arguments a(op, y);
  void* made = result_like(op, "grad_y", grad_y, y, {grad});
  const int64_t images = y.size(0), channels = y.size(1);
  training::Elements p{};
  p.images = images;
  p.pixels = y.size(2) * y.size(3);
  p.channels = int(channels);
  p.dtype = a.dtype;
  const training::Gradient of_y{a.images("grad", grad, SHAPE_OF(y)),
                                a.x(),
                                a.vectors("norm", norm, {3, channels}),
                                a.vectors("coefficients", coefficients, {3, channels}),
                                a.vectors("gate", gate, {images, channels}),
                                a.vectors("pool", pool, {images, channels}),
                                activation_of(op, activation)};
  training::norm_gradient_cpu(p, of_y, made);
}

Tensor norm_gradient(const Tensor& grad, const Tensor& y, const Tensor& norm, const Tensor& coefficients, const Text& activation,
                     const OptionalTensor& gate, const OptionalTensor& pool) {
  check_images("norm_gradient", "y", y);
  const Tensor grad_y = made_like(y);
  norm_gradient_out(grad, y, norm, coefficients, activation, gate, pool, grad_y);
  return grad_y;
}

void batch_stats_out(const Tensor& y, const Tensor& mean, const Tensor& var) {
  Arguments a("batch_stats", y);
  float* means = vector_result("batch_stats", "mean", mean, y, {y.size(1)});
  float* vars = vector_result("batch_stats", "var", var, y, {y.size(1)});
  training::batch_stats_cpu(elements(a, y, std::nullopt, "identity", std::nullopt), means, vars);
}

std::tuple<Tensor, Tensor> batch_stats(const Tensor& y) {
  check_images("batch_stats", "y", y);
  const Tensor mean = empty_vectors(y, {y.size(1)}), var = empty_vectors(y, {y.size(1)});
  batch_stats_out(y, mean, var);
  return {mean, var};
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("pointwise_conv_stats.native", TORCH_BOX(&stats<IsPointwise>));
  m.impl("pointwise_conv_stats.native_out", TORCH_BOX(&stats_out<IsPointwise>));
  m.impl("pointwise_conv_backward.native", TORCH_BOX(&backward<IsPointwise>));
  m.impl("pointwise_conv_backward.native_out", TORCH_BOX(&backward_out<IsPointwise>));
  m.impl("depthwise_conv_stats.native", TORCH_BOX(&stats<IsDepthwise>));
  m.impl("depthwise_conv_stats.native_out", TORCH_BOX(&stats_out<IsDepthwise>));
  m.impl("depthwise_conv_backward.native", TORCH_BOX(&backward<IsDepthwise>));
  m.impl("depthwise_conv_backward.native_out", TORCH_BOX(&backward_out<IsDepthwise>));
  m.impl("norm_act.native", TORCH_BOX(&norm_act));
  m.impl("norm_act.native_out", TORCH_BOX(&norm_act_out));
  m.impl("norm_act_mean.native", TORCH_BOX(&norm_act_mean));
  m.impl("norm_act_mean.native_out", TORCH_BOX(&norm_act_mean_out));
  m.impl("norm_act_sums.native", TORCH_BOX(&norm_act_sums));
  m.impl("norm_act_sums.native_out", TORCH_BOX(&norm_act_sums_out));
  m.impl("norm_act_image_sums.native", TORCH_BOX(&norm_act_image_sums));
  m.impl("norm_act_image_sums.native_out", TORCH_BOX(&norm_act_image_sums_out));
  m.impl("norm_act_backward.native", TORCH_BOX(&norm_act_backward));
  m.impl("norm_act_backward.native_out", TORCH_BOX(&norm_act_backward_out));
  m.impl("norm_gradient.native", TORCH_BOX(&norm_gradient));
  m.impl("norm_gradient.native_out", TORCH_BOX(&norm_gradient_out));
  m.impl("batch_stats.native", TORCH_BOX(&batch_stats));
  m.impl("batch_stats.native_out", TORCH_BOX(&batch_stats_out));
}

#ifdef EFFNET_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CUDA, m) {
  m.impl("pointwise_conv_stats.native", TORCH_BOX(&stats<IsPointwiseCuda>));
  m.impl("pointwise_conv_stats.native_out", TORCH_BOX(&stats_out<IsPointwiseCuda>));
  m.impl("pointwise_conv_backward.native", TORCH_BOX(&backward<IsPointwiseCuda>));
  m.impl("pointwise_conv_backward.native_out", TORCH_BOX(&backward_out<IsPointwiseCuda>));
  m.impl("depthwise_conv_stats.native", TORCH_BOX(&stats<IsDepthwiseCuda>));
  m.impl("depthwise_conv_stats.native_out", TORCH_BOX(&stats_out<IsDepthwiseCuda>));
  m.impl("depthwise_conv_backward.native", TORCH_BOX(&backward<IsDepthwiseCuda>));
  m.impl("depthwise_conv_backward.native_out", TORCH_BOX(&backward_out<IsDepthwiseCuda>));
}
#endif

}  // namespace
}  // namespace effnet_fast::binding
