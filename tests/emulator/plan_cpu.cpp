// A small net of every kernel of a plan, recorded, joined and replayed under the sanitizers, beside the same kernels called one by
// one. What an image's kernels write to is exactly as long as they should write.
#include "cpu.h"

#include <cmath>
#include <random>

#include "common/memory.cpp"
#include "inference/expand_depthwise.cpp"
#include "inference/plan.cpp"
#include "inference/store.cpp"
#include "kernels.h"
#include "pool/pool_cpu.cpp"

using namespace effnet_fast;

namespace {

class Buffers {
 public:
  char* take(size_t bytes) { return taken_.emplace_back(std::make_unique<char[]>(bytes)).get(); }

 private:
  std::vector<std::unique_ptr<char[]>> taken_;
};

struct Image {
  char* at;
  int channels, height, width;
};

// Gives every layer weights of its own, the same ones each time that the net runs.
class Net {
 public:
  Net(const emulated::NetShape& shape) : shape_(shape), random_(7) {}

  // The classes of one image.
  char* run(const char* image) {
    random_.seed(7);
    const emulated::NetShape& s = shape_;
    Image x = stem(image);
    x = project(depthwise(x, 3, 1, 3), s.channels, nullptr);
    for (const int stride : {1, 2, 1}) {
      const int pieces = stride == 2 ? 0 : 2, kernel = stride == 2 ? 3 : 5;
      const Image expanded = pointwise(x, s.expanded, Activation(s.activation), nullptr, nullptr);
      x = project(depthwise(expanded, kernel, stride, pieces), s.channels, stride == 1 ? &x : nullptr);
    }
    const Image head = pointwise(x, s.head, Activation(s.activation), nullptr, nullptr);
    pool::Params p{head.at, take(s.head), 1, int64_t(head.height) * head.width, s.head, DType(s.dtype)};
    inference::call(p, pool::average_cpu);
    return pointwise({static_cast<char*>(p.y), s.head, 1, 1}, s.classes, Activation::identity, nullptr, nullptr).at;
  }

 private:
  size_t size() const { return size_of(DType(shape_.dtype)); }
  char* take(size_t elements) { return memory_.take(elements * size()); }

  char* weights(size_t count, float scale, bool is_float = false) {
    char* const to = is_float ? memory_.take(count * sizeof(float)) : take(count);
    for (size_t i = 0; i < count; ++i) {
      const float value = (float(random_() >> 8) / (1 << 23) - 1) * scale;
      if (is_float) {
        reinterpret_cast<float*>(to)[i] = value;
      } else {
        with_dtype(DType(shape_.dtype), [&](auto type) { from_float(value, reinterpret_cast<decltype(type)*>(to) + i); });
      }
    }
    return to;
  }
  static void from_float(float value, float* to) { *to = value; }
  template <typename T> static void from_float(float value, T* to) { simd::store<1>(to, simd::Float<1>{value}); }

  template <typename P> void set_norm(P& p, int channels) {
    float* const scale = reinterpret_cast<float*>(weights(channels, 0.5f, true));
    float* const variance = reinterpret_cast<float*>(weights(channels, 0.5f, true));
    for (int i = 0; i < channels; ++i) {  // layers that keep the size of what they are given, so that no image is lost on the way
      scale[i] += 1.5f;
      variance[i] += 1.f;
    }
    p.norm_weight = scale;
    p.norm_bias = weights(channels, 0.3f, true);
    p.norm_mean = weights(channels, 0.3f, true);
    p.norm_var = variance;
    p.eps = 1e-3f;
    p.activation = Activation(shape_.activation);
    p.dtype = p.weight_dtype = DType(shape_.dtype);
    p.norm_dtype = DType::fp32;
  }

  Image stem(const char* image) {
    const emulated::NetShape& s = shape_;
    conv::Params p{};
    set_norm(p, s.stem);
    p.x = image;
    p.weight = weights(27 * s.stem, 0.33f);
    p.batch = 1;
    p.x_channel = int64_t(s.height) * s.width;
    p.x_image = 3 * p.x_channel;
    p.x_row = s.width;
    p.x_pixel = 1;
    p.in_channels = 3;
    p.channels = s.stem;
    p.height = s.height;
    p.width = s.width;
    p.kernel = 3;
    p.stride = 2;
    p.pad_top = p.pad_left = 1;
    p.out_height = (s.height - 1) / 2 + 1;
    p.out_width = (s.width - 1) / 2 + 1;
    p.y = take(int64_t(p.out_height) * p.out_width * s.stem);
    inference::call(p, emulated::conv_cpu);
    return {static_cast<char*>(p.y), s.stem, p.out_height, p.out_width};
  }

  struct Squeezed {
    Image y;
    float* partial;
    int pieces;
  };

  Squeezed depthwise(const Image& x, int kernel, int stride, int pieces) {
    depthwise::ForwardParams p{};
    set_norm(p, x.channels);
    p.x = x.at;
    p.weight = weights(size_t(kernel) * kernel * x.channels, 1.7f / kernel);
    p.batch = 1;
    p.x_pixel = p.channels = x.channels;
    p.x_row = p.x_pixel * x.width;
    p.x_image = p.x_row * x.height;
    p.height = x.height;
    p.width = x.width;
    p.kernel = kernel;
    p.stride = stride;
    p.pad_top = p.pad_left = (kernel - stride) / 2;  // even sizes at stride 2: more zeros at the end
    p.out_height = (x.height - 1) / stride + 1;
    p.out_width = (x.width - 1) / stride + 1;
    p.pieces = std::min(pieces, p.out_height);
    p.y = take(int64_t(p.out_height) * p.out_width * x.channels);
    p.partial = pieces ? reinterpret_cast<float*>(memory_.take(sizeof(float) * p.pieces * x.channels)) : nullptr;
    inference::call(p, emulated::depthwise_cpu);
    return {{static_cast<char*>(p.y), x.channels, p.out_height, p.out_width}, p.partial, p.pieces};
  }

  Image project(const Squeezed& x, int channels, const Image* residual) {
    if (!x.partial) return pointwise(x.y, channels, Activation::identity, nullptr, nullptr);
    squeeze_excite::GateParams p{};
    p.partial = x.partial;
    p.batch = 1;
    p.pieces = x.pieces;
    p.channels = x.y.channels;
    p.reduced = shape_.reduced;
    p.count = float(x.y.height) * x.y.width;
    p.activation = Activation(shape_.activation);
    p.dtype = DType(shape_.dtype);
    p.reduce_weight = weights(size_t(p.channels) * p.reduced, 0.3f);
    p.reduce_bias = weights(p.reduced, 1);
    p.expand_weight = weights(size_t(p.channels) * p.reduced, 0.3f);
    p.expand_bias = weights(p.channels, 1);
    p.gate = reinterpret_cast<float*>(memory_.take(sizeof(float) * p.channels));
    inference::call(p, emulated::squeeze_excite_gate_cpu);
    return pointwise(x.y, channels, Activation::identity, p.gate, residual);
  }

  Image pointwise(const Image& x, int channels, Activation activation, const float* gate, const Image* residual) {
    pointwise::Params p{};
    set_norm(p, channels);
    p.activation = activation;
    p.x = x.at;
    p.weight = weights(size_t(x.channels) * channels, 1.7f / std::sqrt(float(x.channels)));
    p.gate = gate;
    p.residual = residual ? residual->at : nullptr;
    p.rows = p.pixels = int64_t(x.height) * x.width;
    p.in_channels = x.channels;
    p.out_channels = channels;
    p.y_row = channels;
    p.y = take(p.rows * channels);
    inference::call(p, emulated::pointwise_cpu);
    return {static_cast<char*>(p.y), channels, x.height, x.width};
  }

  const emulated::NetShape shape_;
  std::mt19937 random_;
  Buffers memory_;
};

}  // namespace

size_t emulated::plan_cpu(const NetShape& s, int images, const char* x, char* planned, char* direct) {
  const size_t size = size_of(DType(s.dtype)), image = size * 3 * s.height * s.width, result = size * s.classes;
  const auto store = std::make_shared<inference::Store>();
  const auto run = [&] {
    inference::Plan plan(store);
    plan.add_input({x, image});
    Net recorded(s);
    const char* const made = recorded.run(x);
    plan.stop();
    plan.finish({{made, result}});
    memset(planned, 0xff, images * result);
    plan.run(images, {{x, images * image}}, {{planned, images * result}});
    return plan.steps();
  };
  run();
  const size_t held = store->bytes(), steps = run();
  if (store->bytes() != held) throw std::runtime_error("a second plan of the same net keeps its weights again");
  for (int i = 0; i < images; ++i) memcpy(direct + i * result, Net(s).run(x + i * image), result);
  return steps;
}
