// Training's CUDA kernels as functions of NumPy arrays, which begin `misalign` elements late; outputs start as NaN.
#include <array>
#include <cmath>
#include <tuple>

#include "buffer.h"
#include "kernels.h"

using namespace effnet_fast;
using training::Depthwise;

namespace {

using Shape = std::vector<int64_t>;

// A result of that type, in memory of its own until it is taken.
class Result {
 public:
  Result(const py::dtype& type, Shape shape, int misalign)
      : array_(type, std::move(shape)), buffer_(size_t(array_.nbytes()), size_t(misalign * array_.itemsize())) {
    std::memset(buffer_.data(), 0xff, size_t(array_.nbytes()));  // NaN
  }
  char* data() const { return buffer_.data(); }
  float* floats() const { return reinterpret_cast<float*>(data()); }
  py::array take() {
    std::memcpy(array_.mutable_data(), data(), size_t(array_.nbytes()));
    return array_;
  }

 private:
  py::array array_;
  Buffer buffer_;
};

const float* floats(const std::optional<Buffer>& b) { return b ? reinterpret_cast<const float*>(b->data()) : nullptr; }

// x [N, H, W, C], weight [C, k, k], norm [3, C] or None; window is stride, top, left, H', W'; types are those of x and weight.
struct Arguments {
  Buffer x, weight;
  std::optional<Buffer> norm;
  Depthwise p{};
  Arguments(const py::array& x, const py::array& weight, const OptionalArray& norm, const std::array<int, 5>& window,
            int activation, const std::array<int, 2>& types, int misalign)
      : x(x, misalign), weight(weight, misalign), norm(optional_buffer(norm, misalign)) {
    p.images = x.shape(0);
    p.height = int(x.shape(1));
    p.width = int(x.shape(2));
    p.channels = int(x.shape(3));
    p.kernel = int(weight.shape(1));
    std::tie(p.stride, p.pad_top, p.pad_left, p.out_height, p.out_width) = std::tuple_cat(window);
    p.dtype = DType(types[0]);
    p.weight_dtype = DType(types[1]);
    p.read = {this->x.data(), floats(this->norm), nullptr, Activation(activation)};
    p.weight = this->weight.data();
  }
};

std::tuple<py::array, py::array, py::array> depthwise_stats(const py::array& x, const py::array& weight, const OptionalArray& norm,
                                                            const std::array<int, 5>& window, int activation,
                                                            const std::array<int, 2>& types, int multiprocessors, unsigned seed,
                                                            int misalign) {
  const Arguments a(x, weight, norm, window, activation, types, misalign);
  Result y(x.dtype(), {a.p.images, a.p.out_height, a.p.out_width, a.p.channels}, misalign);
  const py::dtype kept("f4");
  Result mean(kept, {a.p.channels}, 0), var(kept, {a.p.channels}, 0);
  with_dtype(a.p.dtype, [&](auto type) {
    emulated::depthwise_stats<decltype(type)>(a.p, {y.data(), mean.floats(), var.floats()}, multiprocessors, seed);
  });
  return {y.take(), mean.take(), var.take()};
}

// of_y: grad, y, norm, coefficients, gate or None, pool or None; need: of grad_x and of grad_weight.
std::tuple<py::array, py::array, py::array> depthwise_backward(const py::array& x, const py::array& weight,
                                                               const OptionalArray& norm, const std::array<int, 5>& window,
                                                               int activation, const std::array<int, 2>& types,
                                                               const std::vector<OptionalArray>& of_y, int y_activation,
                                                               const OptionalArray& residual, const std::array<bool, 2>& need,
                                                               int multiprocessors, unsigned seed, int misalign) {
  const Arguments a(x, weight, norm, window, activation, types, misalign);
  std::vector<std::optional<Buffer>> of;
  for (const OptionalArray& array : of_y) of.push_back(optional_buffer(array, misalign));
  const std::optional<Buffer> added = optional_buffer(residual, misalign);
  Result grad_x(x.dtype(), {a.p.images, a.p.height, a.p.width, a.p.channels}, misalign);
  const py::dtype kept("f4");
  Result grad_weight(kept, {a.p.channels, a.p.kernel, a.p.kernel}, 0), sums(kept, {2, a.p.channels}, 0);
  training::Gradients made{};
  made.of_y = {of[0]->data(), of[1]->data(), floats(of[2]), floats(of[3]), floats(of[4]), floats(of[5]), Activation(y_activation)};
  made.residual = added ? added->data() : nullptr;
  made.grad_x = need[0] ? grad_x.data() : nullptr;
  made.grad_weight = need[1] ? grad_weight.floats() : nullptr;
  made.sums = need[0] && a.norm ? sums.floats() : nullptr;
  with_dtype(a.p.dtype, [&](auto type) { emulated::depthwise_backward<decltype(type)>(a.p, made, multiprocessors, seed); });
  return {grad_x.take(), grad_weight.take(), sums.take()};
}

// x [N, pixels, C], weight [K, C], norm [3, C] or None, gate [N, C] or None; types are those of x and weight.
std::tuple<py::array, py::array, py::array> pointwise_stats(const py::array& x, const py::array& weight, const OptionalArray& norm,
                                                            const OptionalArray& gate, int activation,
                                                            const std::array<int, 2>& types, int multiprocessors, int shared_bytes,
                                                            unsigned seed) {
  const Buffer images(x, 0), weights(weight, 0);
  const std::optional<Buffer> norms = optional_buffer(norm, 0), gates = optional_buffer(gate, 0);
  const int out = int(weight.shape(0));
  Result y(x.dtype(), {x.shape(0), x.shape(1), out}, 0);
  const py::dtype kept("f4");
  Result mean(kept, {out}, 0), var(kept, {out}, 0);
  const training::Pointwise p{{images.data(), floats(norms), floats(gates), Activation(activation)},
                              weights.data(),
                              x.shape(0),
                              x.shape(1),
                              int(x.shape(2)),
                              out,
                              DType(types[0]),
                              DType(types[1])};
  const training::Stats made{y.data(), mean.floats(), var.floats()};
  if (p.dtype == DType::bf16)
    emulated::pointwise_stats<bf16>(p, made, multiprocessors, shared_bytes, seed);
  else
    emulated::pointwise_stats<fp16>(p, made, multiprocessors, shared_bytes, seed);
  return {y.take(), mean.take(), var.take()};
}

// of_y: grad, y, norm, coefficients, gate or None, pool or None; need: of grad_x and of grad_weight; else as above.
std::tuple<py::array, py::array, py::array> pointwise_backward(const py::array& x, const py::array& weight,
                                                               const OptionalArray& norm, const OptionalArray& gate, int activation,
                                                               const std::array<int, 2>& types,
                                                               const std::vector<OptionalArray>& of_y, int y_activation,
                                                               const OptionalArray& residual, const std::array<bool, 2>& need,
                                                               int multiprocessors, int shared_bytes, unsigned seed) {
  const Buffer images(x, 0), weights(weight, 0);
  const std::optional<Buffer> norms = optional_buffer(norm, 0), gates = optional_buffer(gate, 0);
  std::vector<std::optional<Buffer>> of;
  for (const OptionalArray& array : of_y) of.push_back(optional_buffer(array, 0));
  const std::optional<Buffer> added = optional_buffer(residual, 0);
  const int out = int(weight.shape(0)), channels = int(x.shape(2));
  Result grad_x(x.dtype(), {x.shape(0), x.shape(1), channels}, 0);
  const py::dtype kept("f4");
  Result grad_weight(kept, {out, channels}, 0), sums(kept, gate ? Shape{x.shape(0), 5, channels} : Shape{2, channels}, 0);
  const training::Pointwise p{{images.data(), floats(norms), floats(gates), Activation(activation)},
                              weights.data(),
                              x.shape(0),
                              x.shape(1),
                              channels,
                              out,
                              DType(types[0]),
                              DType(types[1])};
  training::Gradients made{};
  made.of_y = {of[0]->data(), of[1]->data(), floats(of[2]), floats(of[3]), floats(of[4]), floats(of[5]), Activation(y_activation)};
  made.residual = added ? added->data() : nullptr;
  made.grad_x = need[0] ? grad_x.data() : nullptr;
  made.grad_weight = need[1] ? grad_weight.floats() : nullptr;
  made.sums = need[0] && norm ? sums.floats() : nullptr;
  if (p.dtype == DType::bf16)
    emulated::pointwise_backward<bf16>(p, made, multiprocessors, shared_bytes, seed);
  else
    emulated::pointwise_backward<fp16>(p, made, multiprocessors, shared_bytes, seed);
  return {grad_x.take(), grad_weight.take(), sums.take()};
}

}  // namespace

void bind_training(py::module_& m) {
  m.def("depthwise_stats", &depthwise_stats);
  m.def("depthwise_backward", &depthwise_backward);
  m.def("pointwise_stats", &pointwise_stats);
  m.def("pointwise_backward", &pointwise_backward);
}
