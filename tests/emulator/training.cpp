// Training's CPU kernels under AddressSanitizer and UBSan, on shapes drawn at random: every tensor is a block of memory of its own,
// of exactly its size, and every element of a result must have been written. What they compute is tested where torch is.
//
//   training SEED COUNT
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>

#include "training/elements.h"

namespace effnet_fast {  // three threads, one after the other
int thread_count() { return 3; }
void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(3, count / grain));
  for (int64_t i = 0; i < parts; ++i) body(count * i / parts, count * (i + 1) / parts, context);
}
}  // namespace effnet_fast

namespace {

using namespace effnet_fast;
using namespace effnet_fast::training;

std::mt19937 engine;
int draw(int first, int last) { return std::uniform_int_distribution<int>(first, last)(engine); }
bool coin() { return draw(0, 1); }

// Bytes of elements of a type; inputs from -2 to 2, results NaN.
struct Memory {
  int64_t count;
  DType dtype;
  std::unique_ptr<char[]> bytes;
  Memory(int64_t count, DType dtype, bool result) : count(count), dtype(dtype), bytes(new char[count * size_of(dtype)]) {
    for (int64_t i = 0; i < count; ++i) {
      const float v = result ? NAN : float(draw(-200, 200)) / 100.f;
      simd::Float<1> one{v};
      store_any<1>(bytes.get(), i, dtype, one);
    }
  }
  void check(const char* what) const {
    for (int64_t i = 0; i < count; ++i)
      if (!std::isfinite(load_any<1>(bytes.get(), i, dtype)[0]))
        throw std::runtime_error(std::string(what) + " was not all written");
  }
  float* floats() { return reinterpret_cast<float*>(bytes.get()); }
};

struct Tensors {
  std::vector<std::unique_ptr<Memory>> all;
  Memory& make(int64_t count, DType dtype = DType::fp32, bool result = false) {
    return *all.emplace_back(std::make_unique<Memory>(count, dtype, result));
  }
  float* vectors(int64_t count) { return make(count).floats(); }
};

Activation activation() { return static_cast<Activation>(draw(0, 3)); }
DType dtype() { return static_cast<DType>(draw(0, 2)); }

Read read(Tensors& t, int64_t elements, int images, int channels, DType dtype, bool may_gate) {
  Read read{t.make(elements, dtype).bytes.get(), nullptr, nullptr, Activation::identity};
  if (coin()) {
    read.norm = t.vectors(3 * channels);
    read.activation = activation();
    if (may_gate && coin()) read.gate = t.vectors(images * channels);
  }
  return read;
}

template <typename Params, typename Forward, typename Backward>
void both_ways(Tensors& t, const Params& p, int images, int channels, int outs, int64_t in_size, int64_t out_size, int64_t weights,
               const Forward& forward, const Backward& backward) {
  Memory &y = t.make(out_size, p.dtype, true), &mean = t.make(outs, DType::fp32, true), &var = t.make(outs, DType::fp32, true);
  forward(p, Stats{y.bytes.get(), mean.floats(), var.floats()});
  y.check("y"), mean.check("mean"), var.check("var");
  Gradients made{};
  made.of_y = {t.make(out_size, p.dtype).bytes.get(),
               y.bytes.get(),
               t.vectors(3 * outs),
               t.vectors(3 * outs),
               coin() ? t.vectors(images * outs) : nullptr,
               coin() ? t.vectors(images * outs) : nullptr,
               activation()};
  if (coin()) made.residual = t.make(in_size, p.dtype).bytes.get();
  Memory &grad_x = t.make(in_size, p.dtype, true), &grad_weight = t.make(weights, DType::fp32, true);
  Memory& sums = t.make(p.read.gate ? images * 5 * channels : 2 * channels, DType::fp32, true);
  const bool need_x = draw(0, 3), need_weight = draw(0, 3);
  if (need_x) made.grad_x = grad_x.bytes.get();
  if (need_weight) made.grad_weight = grad_weight.floats();
  if (need_x && p.read.norm) made.sums = sums.floats();
  backward(p, made);
  if (made.grad_x) grad_x.check("grad_x");
  if (made.grad_weight) grad_weight.check("grad_weight");
  if (made.sums) sums.check("sums");
}

void depthwise() {
  Tensors t;
  Depthwise p{};
  p.images = draw(1, 3);
  p.channels = draw(1, 90);
  p.kernel = coin() ? 3 : 5;
  p.stride = draw(1, 2);
  p.pad_top = draw(0, p.kernel);
  p.pad_left = draw(0, p.kernel);
  const int bottom = draw(0, p.kernel), right = draw(0, p.kernel);
  p.height = draw(std::max(1, p.kernel - p.pad_top - bottom), 19);
  p.width = draw(std::max(1, p.kernel - p.pad_left - right), 19);
  p.out_height = (p.height + p.pad_top + bottom - p.kernel) / p.stride + 1;
  p.out_width = (p.width + p.pad_left + right - p.kernel) / p.stride + 1;
  p.dtype = dtype();
  p.weight_dtype = dtype();
  const int64_t in_size = p.images * p.height * p.width * p.channels, out_size = p.images * p.out_height * p.out_width * p.channels;
  const int64_t weights = int64_t(p.channels) * p.kernel * p.kernel;
  p.read = read(t, in_size, int(p.images), p.channels, p.dtype, false);
  p.weight = t.make(weights, p.weight_dtype).bytes.get();
  both_ways(t, p, int(p.images), p.channels, p.channels, in_size, out_size, weights, depthwise_stats_cpu, depthwise_backward_cpu);
}

void pointwise() {
  Tensors t;
  Pointwise p{};
  p.images = draw(1, 5);
  p.pixels = draw(1, 150);
  p.in_channels = draw(1, coin() ? 40 : 640);
  p.out_channels = draw(1, coin() ? 40 : 200);
  p.dtype = dtype();
  p.weight_dtype = dtype();
  const int64_t rows = p.images * p.pixels, weights = int64_t(p.in_channels) * p.out_channels;
  p.read = read(t, rows * p.in_channels, int(p.images), p.in_channels, p.dtype, true);
  p.weight = t.make(weights, p.weight_dtype).bytes.get();
  both_ways(t, p, int(p.images), p.in_channels, p.out_channels, rows * p.in_channels, rows * p.out_channels, weights,
            pointwise_stats_cpu, pointwise_backward_cpu);
}

void norm_act() {
  Tensors t;
  Elements p{};
  p.images = draw(1, 4);
  p.pixels = draw(1, 90);
  p.channels = draw(1, 70);
  p.dtype = dtype();
  const int64_t size = p.images * p.pixels * p.channels;
  p.read = {t.make(size, p.dtype).bytes.get(), t.vectors(3 * p.channels), coin() ? t.vectors(p.images * p.channels) : nullptr,
            activation()};
  const auto result = [&](int64_t count, DType dtype = DType::fp32) -> Memory& { return t.make(count, dtype, true); };
  Memory &out = result(size, p.dtype), &grad_x = result(size, p.dtype), &grad_y = result(size, p.dtype);
  Memory &mean = result(p.images * p.channels), &sums = result(2 * p.channels), &image_sums = result(p.images * 5 * p.channels);
  Memory &backward_sums = result(2 * p.channels), &means = result(p.channels), &vars = result(p.channels);
  const void* residual = coin() ? t.make(size, p.dtype).bytes.get() : nullptr;
  const void* grad = t.make(size, p.dtype).bytes.get();
  const float* per_image = coin() ? t.vectors(p.images * p.channels) : nullptr;
  const Gradient of_y{grad, p.read.x, p.read.norm, t.vectors(3 * p.channels), per_image, per_image, p.read.activation};
  norm_act_cpu(p, residual, out.bytes.get());
  norm_act_mean_cpu(p, mean.floats());
  norm_act_sums_cpu(p, grad, sums.floats());
  norm_act_image_sums_cpu(p, grad, image_sums.floats());
  norm_act_backward_cpu(p, grad, residual, grad_x.bytes.get(), backward_sums.floats());
  norm_gradient_cpu(p, of_y, grad_y.bytes.get());
  batch_stats_cpu(p, means.floats(), vars.floats());
  out.check("out"), mean.check("mean"), sums.check("sums"), image_sums.check("image_sums"), grad_x.check("grad_x");
  grad_y.check("grad_y"), backward_sums.check("sums of backward"), means.check("means"), vars.check("vars");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  engine.seed(unsigned(atoi(arguments[1])));
  for (int i = 0; i < atoi(arguments[2]); ++i) depthwise(), pointwise(), norm_act();
  puts("sound");
}
