// The emulated chain as a function of NumPy arrays, which its steps name by number.
#include <cstring>

#include "buffer.h"
#include "kernels.h"

using effnet_fast::Activation;
using effnet_fast::DType;
namespace chain = effnet_fast::chain;

namespace {

// Its kind, the numbers of its arrays in the order of its params (-1: null), its sizes in the order of the enum's cases below, its
// activation.
using PlainStep = std::tuple<int, std::vector<int>, std::vector<int>, int>;

chain::Step step_of(const PlainStep& plain, const std::vector<Buffer>& buffers, DType dtype) {
  const auto& [kind, arrays, sizes, activation] = plain;
  const auto at = [&, &arrays = arrays](int i) { return arrays.at(i) < 0 ? nullptr : buffers.at(arrays.at(i)).data(); };
  const auto set_norm = [&](auto& p, int first) {
    p.norm_weight = at(first), p.norm_bias = at(first + 1), p.norm_mean = at(first + 2), p.norm_var = at(first + 3);
    p.eps = 1e-3f;
    p.dtype = p.weight_dtype = dtype;
    p.norm_dtype = DType::fp32;
  };
  switch (chain::Kind(kind)) {
    case chain::Kind::stem: {
      effnet_fast::conv::Params p{};
      p.x = at(0), p.weight = at(1), p.pixels = reinterpret_cast<const float*>(at(6)), p.y = at(7);
      set_norm(p, 2);
      p.batch = sizes.at(0), p.in_channels = sizes.at(1), p.channels = sizes.at(2), p.height = sizes.at(3), p.width = sizes.at(4);
      p.out_height = sizes.at(5), p.out_width = sizes.at(6), p.kernel = 3, p.stride = 2;
      p.pad_top = sizes.at(7), p.pad_left = sizes.at(8);
      const int64_t plane = int64_t(p.height) * p.width;
      const bool planes = sizes.at(9);
      p.x_image = plane * p.in_channels, p.x_channel = planes ? plane : 1, p.x_pixel = planes ? 1 : p.in_channels;
      p.x_row = p.x_pixel * p.width;
      p.activation = Activation(activation);
      return chain::Step(p);
    }
    case chain::Kind::pool: {
      const effnet_fast::pool::Params p{at(0), at(1), sizes.at(0), sizes.at(1), sizes.at(2), dtype};
      return chain::Step(p);
    }
    case chain::Kind::depthwise: {
      effnet_fast::depthwise::ForwardParams p{};
      p.x = at(0), p.weight = at(1), p.y = at(6), p.partial = reinterpret_cast<float*>(at(7));
      set_norm(p, 2);
      p.batch = sizes.at(0);
      p.channels = sizes.at(1), p.height = sizes.at(2), p.width = sizes.at(3), p.out_height = sizes.at(4),
      p.out_width = sizes.at(5);
      p.kernel = sizes.at(6), p.stride = sizes.at(7), p.pad_top = sizes.at(8), p.pad_left = sizes.at(9), p.pieces = sizes.at(10);
      p.x_pixel = p.channels, p.x_row = p.x_pixel * p.width, p.x_image = p.x_row * p.height;
      p.activation = Activation(activation);
      return chain::Step(p);
    }
    case chain::Kind::gate: {
      effnet_fast::squeeze_excite::GateParams p{};
      p.partial = reinterpret_cast<const float*>(at(0));
      p.reduce_weight = at(1), p.reduce_bias = at(2), p.expand_weight = at(3), p.expand_bias = at(4);
      p.gate = reinterpret_cast<float*>(at(5));
      p.batch = sizes.at(0), p.pieces = sizes.at(1), p.channels = sizes.at(2), p.reduced = sizes.at(3),
      p.count = float(sizes.at(4));
      p.activation = Activation(activation);
      p.dtype = dtype;
      return chain::Step(p);
    }
    case chain::Kind::pointwise: break;
  }
  effnet_fast::pointwise::Params p{};
  p.x = at(0), p.weight = at(1), p.gate = reinterpret_cast<const float*>(at(6)), p.residual = at(7), p.y = at(8);
  set_norm(p, 2);
  p.rows = sizes.at(0), p.pixels = sizes.at(1), p.in_channels = sizes.at(2), p.out_channels = p.y_row = sizes.at(3);
  p.activation = Activation(activation);
  return chain::Step(p);
}

// All arrays as they are after the steps.
std::vector<py::array> run(const std::vector<py::array>& arrays, const std::vector<PlainStep>& plain, int dtype,
                           int multiprocessors, int shared_bytes, unsigned seed) {
  std::vector<Buffer> buffers;
  for (const py::array& a : arrays) buffers.emplace_back(a, 0);
  std::vector<chain::Step> steps;
  for (const PlainStep& s : plain) steps.push_back(step_of(s, buffers, DType(dtype)));
  unsigned barrier = 0;
  if (DType(dtype) == DType::bf16) {
    emulated::chain<effnet_fast::bf16>(steps, &barrier, multiprocessors, shared_bytes, seed);
  } else {
    emulated::chain<effnet_fast::fp16>(steps, &barrier, multiprocessors, shared_bytes, seed);
  }
  std::vector<py::array> made;
  for (size_t i = 0; i < arrays.size(); ++i) {
    py::array a(arrays[i].dtype(), std::vector<py::ssize_t>(arrays[i].shape(), arrays[i].shape() + arrays[i].ndim()));
    std::memcpy(a.mutable_data(), buffers[i].data(), a.nbytes());
    made.push_back(a);
  }
  return made;
}

}  // namespace

void bind_chain(py::module_& m) { m.def("chain", &run); }
