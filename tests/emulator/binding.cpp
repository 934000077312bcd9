// The emulated kernels as functions of NumPy arrays. Every array is copied into memory exactly as long as it, shifted by
// `misalign` elements, so that AddressSanitizer stands at its end; outputs start as NaN.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>

#include "kernels.h"

namespace py = pybind11;
using effnet_fast::Activation;
using effnet_fast::DType;

namespace {

// Memory of its own for an array, or for so many bytes.
class Buffer {
 public:
  Buffer(const py::array& source, int misalign) : Buffer(source.nbytes(), misalign * source.itemsize()) {
    std::memcpy(data(), source.data(), source.nbytes());
  }
  Buffer(size_t bytes, size_t offset) : memory_(static_cast<char*>(std::malloc(bytes + offset)), std::free), offset_(offset) {}
  char* data() const { return memory_.get() + offset_; }

 private:
  std::unique_ptr<char, void (*)(void*)> memory_;
  size_t offset_;
};

// On a GPU of so many multiprocessors, or for 0 on the CPU.
py::array_t<float> squeeze_excite_gate(const py::array& partial, int count, const py::array& reduce_weight,
                                       const std::optional<py::array>& reduce_bias, const py::array& expand_weight,
                                       const std::optional<py::array>& expand_bias, int activation, int dtype, int multiprocessors,
                                       unsigned seed, int misalign) {
  const Buffer sums(partial, misalign), reduce(reduce_weight, misalign), expand(expand_weight, misalign);
  const auto optional = [&](const std::optional<py::array>& a) {
    return a ? std::optional<Buffer>(std::in_place, *a, misalign) : std::nullopt;
  };
  const std::optional<Buffer> reduce_shift = optional(reduce_bias), expand_shift = optional(expand_bias);

  effnet_fast::squeeze_excite::GateParams p{};
  p.batch = partial.shape(0);
  p.pieces = int(partial.shape(1));
  p.channels = int(partial.shape(2));
  p.reduced = int(reduce_weight.shape(0));
  p.count = float(count);
  p.activation = Activation(activation);
  p.dtype = DType(dtype);
  const Buffer hidden(sizeof(float) * p.batch * p.reduced, 0), gate(sizeof(float) * p.batch * p.channels, 0);
  p.partial = reinterpret_cast<const float*>(sums.data());
  p.reduce_weight = reduce.data();
  p.reduce_bias = reduce_shift ? reduce_shift->data() : nullptr;
  p.expand_weight = expand.data();
  p.expand_bias = expand_shift ? expand_shift->data() : nullptr;
  p.hidden = reinterpret_cast<float*>(hidden.data());
  p.gate = reinterpret_cast<float*>(gate.data());
  std::fill_n(p.hidden, p.batch * p.reduced, NAN);
  std::fill_n(p.gate, p.batch * p.channels, NAN);
  if (multiprocessors > 0) {
    emulated::squeeze_excite_gate(p, multiprocessors, seed);
  } else {
    emulated::squeeze_excite_gate_cpu(p);
  }
  py::array_t<float> result({p.batch, int64_t(p.channels)});
  std::copy_n(p.gate, p.batch * p.channels, result.mutable_data());
  return result;
}

// On the CPU; x is [rows, C], norm [4, K]: weight, bias, mean and variance.
py::array pointwise(const py::array& x, const py::array& weight, const py::array& norm, const std::optional<py::array>& gate,
                    const std::optional<py::array>& residual, int pixels, int activation, int dtype, int weight_dtype,
                    int misalign) {
  const Buffer inputs(x, misalign), weights(weight, misalign), norms(norm, misalign);
  const auto optional = [&](const std::optional<py::array>& a) {
    return a ? std::optional<Buffer>(std::in_place, *a, misalign) : std::nullopt;
  };
  const std::optional<Buffer> gates = optional(gate), residuals = optional(residual);

  effnet_fast::pointwise::Params p{};
  p.rows = x.shape(0);
  p.pixels = pixels;
  p.in_channels = int(x.shape(1));
  p.out_channels = int(weight.shape(0));
  p.norm_epsilon = 1e-3f;
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
  p.norm_variance = rows + 3 * p.out_channels;
  p.gate = gates ? reinterpret_cast<const float*>(gates->data()) : nullptr;
  p.residual = residuals ? residuals->data() : nullptr;
  p.y = y.data();
  emulated::pointwise_cpu(p);
  py::array result(x.dtype(), {p.rows, int64_t(p.out_channels)});
  std::memcpy(result.mutable_data(), y.data(), result.nbytes());
  return result;
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  m.def("squeeze_excite_gate", &squeeze_excite_gate);
  m.def("pointwise", &pointwise);
}
