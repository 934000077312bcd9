// A dense k x k convolution from few channels (an EfficientNet's stem: 3x3, stride 2, 3 to 32-64 channels), its norm, activation
// and residual on the CPU, channels_last out.
//
// A thread owns whole output rows. It first copies the k input rows under one to a buffer of floats with the padding around them,
// as planes or, where x is channels_last, pixel by pixel: x is read in its own order, whatever its strides and type. An x of bytes
// is normalised on the way; weights cannot do that, since the padding is zeros around the normalised image. Then kPixels
// neighbouring outputs of two vectors of channels are summed up in registers: k*k*in_channels multiply-adds for each, an input
// loaded for two of them and a vector of weights for kPixels. For the stem these, 27 a vector, bind, with 14 instructions of SiLU.
#include <algorithm>
#include <type_traits>

#include "../common/norm.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "params.h"

namespace effnet_fast::conv {
namespace {

constexpr int kPixels = 6;
constexpr int64_t kGrain = 1 << 19;  // multiply-adds worth a thread: waking a sleeping one costs about 30 us

// The weight as [vectors][taps][W] for vectors of W channels, taps in the order (row, channel, column) of the kernel; then the
// folded norm as [vectors][2][W].
struct Packed {
  const float* weight;
  const float* norm;
};

// The padded rows under one output row.
struct Window {
  float* at;
  int row, channel, pixel;  // strides
  float *scale, *shift;     // of bytes: for each value of an input row, in the window's order
};

struct Task {
  const Params* params;
  Packed packed;
  int64_t first, last;  // output rows, numbered through the images
};

// Sideways. Where a row has one output there is nothing to step over, and a stride beyond the image would only widen the window.
int stride_of(const Params& p) { return p.out_width == 1 ? 1 : p.stride; }

int taps(const Params& p) { return p.kernel * p.kernel * p.in_channels; }

// Vectors overlap where W does not divide the channels: the last one computes some of its neighbour's again.
int vector_start(int vector, int width, int channels) { return std::min(vector * width, channels - width); }

Packed packed_at(const Params& p, int width, const float* weight) {
  return {weight, weight + size_t((p.channels + width - 1) / width) * taps(p) * width};
}

void pack(const Params& p, int width, float* weight) {
  const int vectors = (p.channels + width - 1) / width, area = p.kernel * p.kernel;
  float* const norm = weight + size_t(vectors) * taps(p) * width;
  for (int v = 0; v < vectors; ++v) {
    const int start = vector_start(v, width, p.channels);
    fold_norm(Norm{p.norm_weight, p.norm_bias, p.norm_mean, p.norm_var, p.eps, p.norm_dtype}, start, width, norm + 2 * v * width,
              norm + (2 * v + 1) * width);
    with_dtype(p.weight_dtype, [&](auto type) {
      const auto* source = static_cast<const decltype(type)*>(p.weight) + int64_t(start) * taps(p);
      float* packed = weight + size_t(v) * taps(p) * width;
      for (int row = 0; row < p.kernel; ++row)
        for (int c = 0; c < p.in_channels; ++c)
          for (int column = 0; column < p.kernel; ++column)
            for (int lane = 0; lane < width; ++lane)
              *packed++ = to_float(source[int64_t(lane) * taps(p) + c * area + row * p.kernel + column]);
    });
  }
}

bool is_by_pixel(const Params& p) { return p.x_channel == 1 && p.x_pixel == p.in_channels; }

void fill_scale_and_shift(const Params& p, const Window& window) {
  const bool by_pixel = is_by_pixel(p);
  for (int i = 0; i < p.width * p.in_channels; ++i) {
    const int channel = by_pixel ? i % p.in_channels : i / p.width;
    window.scale[i] = p.pixels[channel];
    window.shift[i] = p.pixels[p.in_channels + channel];
  }
}

// x is of type T: the params' dtype, or bytes.
template <typename T> EFFNET_INLINE void copy_rows(const Params& p, int64_t image, int row, const Window& window) {
  const int start = row * p.stride - p.pad_top;
  const bool by_pixel = is_by_pixel(p);
  const int runs = by_pixel ? 1 : p.in_channels, length = by_pixel ? p.width * p.in_channels : p.width;
  const int64_t step = by_pixel ? 1 : p.x_pixel;
  for (int r = 0; r < p.kernel; ++r) {
    for (int c = 0; c < runs; ++c) {
      float* to = window.at + r * window.row + c * window.channel + p.pad_left * window.pixel;
      if (start + r < 0 || start + r >= p.height) {
        std::fill_n(to, length, 0.f);
        continue;
      }
      const T* from = static_cast<const T*>(p.x) + image * p.x_image + c * p.x_channel + (start + r) * p.x_row;
      const float *scale = window.scale + c * p.width, *shift = window.shift + c * p.width;
      const auto value = [&](int64_t at, int i) {
        if constexpr (std::is_same_v<T, uint8_t>)
          return to_float(from[at]) * scale[i] + shift[i];
        else
          return to_float(from[at]);
      };
      if (step == 1) {
        for (int i = 0; i < length; ++i) to[i] = value(i, i);
      } else {
        for (int i = 0; i < length; ++i) to[i] = value(i * step, i);
      }
    }
  }
}

// kPixels outputs of N vectors from channel `start` on, the first `count` of them stored.
template <int W, int N, typename T> EFFNET_INLINE void tile(const Params& p, const Window& window, const float* x,
                                                            const float* weight, const float* norm, int64_t y, int count) {
  using namespace simd;
  const int all = taps(p), step = stride_of(p) * window.pixel;
  Float<W> v[kPixels][N] = {};
  for (int row = 0; row < p.kernel; ++row)
    for (int c = 0; c < p.in_channels; ++c) {
      const float* at = x + row * window.row + c * window.channel;
      for (int column = 0; column < p.kernel; ++column, at += window.pixel, weight += W) {
        Float<W> w[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) w[n] = load<W>(weight + n * all * W);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) v[i][n] += at[i * step] * w[n];
      }
    }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Float<W> scale = load<W>(norm + 2 * n * W), shift = load<W>(norm + (2 * n + 1) * W);
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) v[i][n] = v[i][n] * scale + shift;
  }
  const auto each = [&](Activation constant) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) v[i][n] = activate<W>(constant, v[i][n]);
  };
  switch (p.activation) {
    case Activation::silu: each(Activation::silu); break;
    case Activation::relu: each(Activation::relu); break;
    case Activation::relu6: each(Activation::relu6); break;
    default: break;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i, y += p.channels) {
    if (i >= count) break;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      if (p.residual) v[i][n] += load<W>(static_cast<const T*>(p.residual) + y + n * W);
      store<W>(static_cast<T*>(p.y) + y + n * W, v[i][n]);
    }
  }
}

template <int W, typename T> EFFNET_INLINE void run_task(const Task& t) {
  const Params& p = *t.params;
  const bool by_pixel = is_by_pixel(p);
  const int rounded = (p.out_width + kPixels - 1) / kPixels * kPixels;
  const int columns = std::max((rounded - 1) * stride_of(p) + p.kernel, p.pad_left + p.width);
  Window window{nullptr, columns * p.in_channels, by_pixel ? 1 : columns, by_pixel ? p.in_channels : 1, nullptr, nullptr};
  const size_t floats = size_t(p.kernel) * window.row, of_row = p.pixels ? size_t(p.width) * p.in_channels : 0;
  window.at = scratch<Window>(floats + 2 * of_row);
  std::fill_n(window.at, floats, 0.f);
  window.scale = window.at + floats;
  window.shift = window.scale + of_row;
  if (p.pixels) fill_scale_and_shift(p, window);
  const int vectors = (p.channels + W - 1) / W;
  for (int64_t row = t.first; row < t.last; ++row) {
    if (p.pixels) {
      copy_rows<uint8_t>(p, row / p.out_height, int(row % p.out_height), window);
    } else {
      copy_rows<T>(p, row / p.out_height, int(row % p.out_height), window);
    }
    for (int v = 0, both; v < vectors; v += both ? 2 : 1) {
      const float* weight = t.packed.weight + int64_t(v) * taps(p) * W;
      const float* norm = t.packed.norm + 2 * v * W;
      const int start = vector_start(v, W, p.channels);
      both = (v + 2) * W <= p.channels;
      for (int out = 0; out < p.out_width; out += kPixels) {
        const float* x = window.at + out * stride_of(p) * window.pixel;
        const int64_t y = (row * p.out_width + out) * p.channels + start;
        const int count = std::min(kPixels, p.out_width - out);
        if (both) {
          tile<W, 2, T>(p, window, x, weight, norm, y, count);
        } else {
          tile<W, 1, T>(p, window, x, weight, norm, y, count);
        }
      }
    }
  }
}

template <int W> EFFNET_INLINE void run_any(const Task& t) {
  switch (t.params->dtype) {
    case DType::fp32: return run_task<W, float>(t);
    case DType::bf16: return run_task<W, bf16>(t);
    case DType::fp16: return run_task<W, fp16>(t);
  }
}

EFFNET_PER_WIDTH(run, run_any)

}  // namespace

size_t packed_bytes(const Params& p) {
  const int width = simd::width_for(p.channels);
  return size_t((p.channels + width - 1) / width) * width * (taps(p) + 2) * sizeof(float);
}

void pack_cpu(const Params& p, void* packed) { pack(p, simd::width_for(p.channels), static_cast<float*>(packed)); }

void conv_cpu(const Params& p) {
  const int width = simd::width_for(p.channels);
  const float* weight = static_cast<const float*>(p.packed);
  if (!weight) {
    float* made = scratch<Packed>(packed_bytes(p) / sizeof(float));
    pack(p, width, made);
    weight = made;
  }
  const Packed packed = packed_at(p, width, weight);
  const int64_t work = int64_t(p.out_width) * p.channels * taps(p);
  parallel_for(p.batch * p.out_height, kGrain / (work + 1) + 1,
               [&](int64_t begin, int64_t end) { run(Task{&p, packed, begin, end}, width); });
}

}  // namespace effnet_fast::conv
