// The emulated kernels as functions of NumPy arrays, each of them in a Buffer; outputs start as NaN.
#include <array>
#include <cmath>
#include <tuple>

#include "buffer.h"
#include "kernels.h"

using effnet_fast::Activation;
using effnet_fast::DType;

namespace {

// On a GPU of so many multiprocessors, or for 0 on the CPU.
py::array_t<float> squeeze_excite_gate(const py::array& partial, int count, const py::array& reduce_weight,
                                       const OptionalArray& reduce_bias, const py::array& expand_weight,
                                       const OptionalArray& expand_bias, int activation, int dtype, int multiprocessors,
                                       int largest_cluster, unsigned seed, int misalign) {
  const Buffer sums(partial, misalign), reduce(reduce_weight, misalign), expand(expand_weight, misalign);
  const std::optional<Buffer> reduce_shift = optional_buffer(reduce_bias, misalign),
                              expand_shift = optional_buffer(expand_bias, misalign);

  effnet_fast::squeeze_excite::GateParams p{};
  p.batch = partial.shape(0);
  p.pieces = int(partial.shape(1));
  p.channels = int(partial.shape(2));
  p.reduced = int(reduce_weight.shape(0));
  p.count = float(count);
  p.activation = Activation(activation);
  p.dtype = DType(dtype);
  const Buffer gate(sizeof(float) * p.batch * p.channels, 0);
  p.partial = reinterpret_cast<const float*>(sums.data());
  p.reduce_weight = reduce.data();
  p.reduce_bias = reduce_shift ? reduce_shift->data() : nullptr;
  p.expand_weight = expand.data();
  p.expand_bias = expand_shift ? expand_shift->data() : nullptr;
  p.gate = reinterpret_cast<float*>(gate.data());
  std::fill_n(p.gate, p.batch * p.channels, NAN);
  if (multiprocessors > 0) {
    emulated::squeeze_excite_gate(p, multiprocessors, largest_cluster, seed);
  } else {
    emulated::squeeze_excite_gate_cpu(p);
  }
  py::array_t<float> result({p.batch, int64_t(p.channels)});
  std::copy_n(p.gate, p.batch * p.channels, result.mutable_data());
  return result;
}

// On a GPU of so many multiprocessors of so much shared memory, or for 0 on the CPU; x is [rows, C], norm [4, K]: weight, bias,
// mean and variance.
py::array pointwise(const py::array& x, const py::array& weight, const py::array& norm, const OptionalArray& gate,
                    const OptionalArray& residual, int pixels, int activation, int dtype, int weight_dtype, int multiprocessors,
                    int shared_bytes, unsigned seed, int misalign) {
  const Buffer inputs(x, misalign), weights(weight, misalign), norms(norm, misalign);
  const std::optional<Buffer> gates = optional_buffer(gate, misalign), residuals = optional_buffer(residual, misalign);

  effnet_fast::pointwise::Params p{};
  p.rows = x.shape(0);
  p.pixels = pixels;
  p.in_channels = int(x.shape(1));
  p.out_channels = int(weight.shape(0));
  p.eps = 1e-3f;
  p.activation = Activation(activation);
  p.dtype = DType(dtype);
  p.weight_dtype = DType(weight_dtype);
  p.norm_dtype = DType::fp32;
  const Buffer y(x.itemsize() * p.rows * p.out_channels, misalign * x.itemsize());
  std::memset(y.data(), 0xff, x.itemsize() * p.rows * p.out_channels);  // NaN
  p.x = inputs.data();
  p.weight = weights.data();
  const float* const rows = reinterpret_cast<const float*>(norms.data());
  p.norm_weight = rows;
  p.norm_bias = rows + p.out_channels;
  p.norm_mean = rows + 2 * p.out_channels;
  p.norm_var = rows + 3 * p.out_channels;
  p.gate = gates ? reinterpret_cast<const float*>(gates->data()) : nullptr;
  p.residual = residuals ? residuals->data() : nullptr;
  p.y = y.data();
  p.y_row = p.out_channels;
  if (multiprocessors == 0) {
    emulated::pointwise_cpu(p);
  } else if (p.dtype == DType::bf16) {
    emulated::pointwise<effnet_fast::bf16>(p, multiprocessors, shared_bytes, seed);
  } else {
    emulated::pointwise<effnet_fast::fp16>(p, multiprocessors, shared_bytes, seed);
  }
  py::array result(x.dtype(), {p.rows, int64_t(p.out_channels)});
  std::memcpy(result.mutable_data(), y.data(), result.nbytes());
  return result;
}

// On a GPU of so many multiprocessors, or for 0 on the CPU: y and partial. x is [N, H, W, at least C], of which the kernel gets the
// first C channels; the weight is [C, k, k]; norm is weight, bias, mean, var; window is stride, top, left, H', W'; types are those
// of x, weight and norm. expansion: of a pointwise convolution in front, which takes all channels of x, weight [C, channels] and
// norm; the other's weight has its norm's type and the reverse, its eps is twice as large; a block may then have shared_bytes of
// memory.
std::pair<py::array, py::array> depthwise(const py::array& x, const py::array& weight, const std::vector<OptionalArray>& norm,
                                          float eps, const std::array<int, 5>& window, int activation, int pieces,
                                          const std::array<int, 3>& types, int multiprocessors, unsigned seed, int misalign,
                                          const std::vector<OptionalArray>& expansion, int shared_bytes) {
  const Buffer input(x, misalign), taps(weight, multiprocessors > 0 ? 0 : misalign);
  std::vector<std::optional<Buffer>> vectors, expanding;
  for (const auto& v : norm) vectors.push_back(optional_buffer(v, misalign));
  for (const auto& v : expansion) expanding.push_back(optional_buffer(v, 0));

  effnet_fast::expand_depthwise::ForwardParams p{};
  p.batch = x.shape(0);
  p.height = int(x.shape(1));
  p.width = int(x.shape(2));
  p.x_pixel = x.shape(3);
  p.x_row = p.x_pixel * p.width;
  p.x_image = p.x_row * p.height;
  p.channels = int(weight.shape(0));
  p.kernel = int(weight.shape(1));
  std::tie(p.stride, p.pad_top, p.pad_left, p.out_height, p.out_width) = std::tuple_cat(window);
  p.pieces = pieces;
  p.eps = eps;
  p.activation = Activation(activation);
  p.dtype = DType(types[0]);
  p.weight_dtype = DType(types[1]);
  p.norm_dtype = DType(types[2]);
  py::array y(x.dtype(), std::vector<int64_t>{p.batch, p.out_height, p.out_width, p.channels});
  py::array_t<float> partial({p.batch, int64_t(pieces), int64_t(p.channels)});
  const Buffer made(y.nbytes(), misalign * y.itemsize()), sums(partial.nbytes(), misalign * sizeof(float));
  std::memset(made.data(), 0xff, y.nbytes());  // NaN
  std::memset(sums.data(), 0xff, partial.nbytes());
  p.x = input.data();
  p.weight = taps.data();
  const auto data = [](const std::optional<Buffer>& b) { return b ? b->data() : nullptr; };
  p.norm_weight = data(vectors[0]);
  p.norm_bias = data(vectors[1]);
  p.norm_mean = data(vectors[2]);
  p.norm_var = data(vectors[3]);
  p.y = made.data();
  p.partial = pieces ? reinterpret_cast<float*>(sums.data()) : nullptr;
  if (!expansion.empty()) {
    p.expand = {expanding[0]->data(),
                data(expanding[1]),
                data(expanding[2]),
                data(expanding[3]),
                data(expanding[4]),
                int(x.shape(3)),
                2 * eps,
                p.norm_dtype,
                p.weight_dtype};
    if (p.dtype == DType::bf16) {
      emulated::expand_depthwise<effnet_fast::bf16>(p, multiprocessors, shared_bytes, seed);
    } else {
      emulated::expand_depthwise<effnet_fast::fp16>(p, multiprocessors, shared_bytes, seed);
    }
  } else if (multiprocessors > 0) {
    effnet_fast::with_dtype(p.dtype, [&](auto type) { emulated::depthwise<decltype(type)>(p, multiprocessors, seed); });
  } else {
    emulated::depthwise_cpu(p);
  }
  std::memcpy(y.mutable_data(), made.data(), y.nbytes());
  std::memcpy(partial.mutable_data(), sums.data(), partial.nbytes());
  return {y, partial};
}

// On a GPU of so many multiprocessors, or for 0 on the CPU; x is [N, H, W, C], by_channel: handed over as [N, C, H, W]; norm is
// weight, bias, mean, var; window is stride, top, left, H', W'; pixels are [2, C] beside an x of bytes; types are those of y,
// weight and norm.
py::array conv(const py::array& x, bool by_channel, const py::array& weight, const std::vector<OptionalArray>& norm,
               const std::array<int, 5>& window, int activation, const OptionalArray& pixels, const OptionalArray& residual,
               const std::array<int, 3>& types, int multiprocessors, unsigned seed, int misalign) {
  const py::array laid =
      by_channel ? py::array(py::module_::import("numpy").attr("ascontiguousarray")(x.attr("transpose")(0, 3, 1, 2))) : x;
  const Buffer input(laid, misalign), taps(weight, misalign);
  std::vector<std::optional<Buffer>> vectors;
  for (const auto& v : norm) vectors.push_back(optional_buffer(v, misalign));
  const int moved = multiprocessors > 0 ? 0 : misalign;  // what a GPU needs aligned
  const std::optional<Buffer> table = optional_buffer(pixels, misalign), added = optional_buffer(residual, moved);
  effnet_fast::conv::Params p{};
  p.batch = x.shape(0);
  p.height = int(x.shape(1));
  p.width = int(x.shape(2));
  p.in_channels = int(x.shape(3));
  p.channels = int(weight.shape(0));
  p.kernel = int(weight.shape(2));
  std::tie(p.stride, p.pad_top, p.pad_left, p.out_height, p.out_width) = std::tuple_cat(window);
  p.eps = 1e-3f;
  p.activation = Activation(activation);
  p.dtype = DType(types[0]);
  p.weight_dtype = DType(types[1]);
  p.norm_dtype = DType(types[2]);
  p.x = input.data();
  const auto data = [](const std::optional<Buffer>& b) { return b ? b->data() : nullptr; };
  p.pixels = reinterpret_cast<const float*>(data(table));
  p.residual = data(added);
  p.x_image = int64_t(p.height) * p.width * p.in_channels;
  p.x_channel = by_channel ? int64_t(p.height) * p.width : 1;
  p.x_row = by_channel ? p.width : p.width * p.in_channels;
  p.x_pixel = by_channel ? 1 : p.in_channels;
  p.weight = taps.data();
  p.norm_weight = data(vectors[0]);
  p.norm_bias = data(vectors[1]);
  p.norm_mean = data(vectors[2]);
  p.norm_var = data(vectors[3]);
  const auto stored = py::dtype(p.dtype == DType::fp32 ? "f4" : "u2");
  py::array y(stored, std::vector<int64_t>{p.batch, p.out_height, p.out_width, p.channels});
  const Buffer made(y.nbytes(), moved * y.itemsize());
  std::memset(made.data(), 0xff, y.nbytes());  // NaN
  p.y = made.data();
  if (multiprocessors > 0) {
    emulated::conv(p, multiprocessors, seed);
  } else {
    emulated::conv_cpu(p);
  }
  std::memcpy(y.mutable_data(), made.data(), y.nbytes());
  return y;
}

// What the plan makes of images [N, 3, H, W], what its kernels do one by one, and the steps of the plan.
std::tuple<py::array, py::array, size_t> plan_cpu(const py::array& x, const std::array<int, 7>& channels, int activation,
                                                  int dtype) {
  const auto [stem, narrow, expanded, reduced, head, classes, misalign] = channels;
  const emulated::NetShape shape{int(x.shape(2)), int(x.shape(3)), stem, narrow, expanded, reduced, head,
                                 classes,         activation,      dtype};
  const Buffer images(x, misalign);
  py::array planned(x.dtype(), {x.shape(0), py::ssize_t(classes)}), direct(x.dtype(), {x.shape(0), py::ssize_t(classes)});
  const Buffer made(planned.nbytes(), misalign * x.itemsize());
  std::memset(made.data(), 0xff, planned.nbytes());  // NaN
  const size_t steps =
      emulated::plan_cpu(shape, int(x.shape(0)), images.data(), made.data(), static_cast<char*>(direct.mutable_data()));
  std::memcpy(planned.mutable_data(), made.data(), planned.nbytes());
  return {planned, direct, steps};
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  m.def("plan_cpu", &plan_cpu);
  m.def("squeeze_excite_gate", &squeeze_excite_gate);
  m.def("pointwise", &pointwise);
  m.def("depthwise", &depthwise);
  m.def("conv", &conv);
  bind_training(m);
  bind_chain(m);
}
