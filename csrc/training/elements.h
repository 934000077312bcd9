// What the CPU kernels of training share: elements of any storage type as vectors of floats, activations with their slopes, and
// statistics and sums that threads gather apart.
//
// Channels are cut into blocks of W. Where W does not divide them the last block overlaps its neighbour and computes some of its
// channels again, to the same values; so sums are kept by lane of a block, and a channel takes those of the last one that has it.
#pragma once
#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "../common/simd.h"
#include "params.h"

namespace effnet_fast::training {

template <int W> EFFNET_INLINE simd::Float<W> load_any(const void* p, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::bf16: return simd::load<W>(static_cast<const bf16*>(p) + i);
    case DType::fp16: return simd::load<W>(static_cast<const fp16*>(p) + i);
    default: return simd::load<W>(static_cast<const float*>(p) + i);
  }
}

// Returns what was stored: v, rounded to the type.
template <int W> EFFNET_INLINE simd::Float<W> store_any(void* p, int64_t i, DType dtype, simd::Float<W> v) {
  switch (dtype) {
    case DType::bf16: simd::store<W>(static_cast<bf16*>(p) + i, v); break;
    case DType::fp16: simd::store<W>(static_cast<fp16*>(p) + i, v); break;
    default: simd::store<W>(static_cast<float*>(p) + i, v); return v;
  }
  return load_any<W>(p, i, dtype);
}

template <int W> struct Activated {
  simd::Float<W> value, slope;
};

template <int W> EFFNET_INLINE Activated<W> activate_with_slope(Activation activation, simd::Float<W> u) {
  using namespace simd;
  const Float<W> zero{}, one = zero + 1.f;
  switch (activation) {
    case Activation::silu: {
      const Float<W> sigmoid = one / one_plus_exp_of_minus<W>(u), value = u * sigmoid;
      return {value, sigmoid + value * (one - sigmoid)};
    }
    case Activation::relu: return {activate<W>(activation, u), u <= zero ? zero : one};
    case Activation::relu6: return {activate<W>(activation, u), (u <= zero) | (u >= zero + 6.f) ? zero : one};
    default: return {u, one};
  }
}

inline int blocks_of(int channels, int width) { return (channels + width - 1) / width; }
template <int W> EFFNET_INLINE int block_start(int block, int channels) { return std::min(block * W, channels - W); }

template <int W> struct Vectors {
  simd::Float<W> mean, scale, bias;
  EFFNET_INLINE Vectors(const float* norm, int channels, int channel)
      : mean(simd::load<W>(norm + channel)),
        scale(simd::load<W>(norm + channels + channel)),
        bias(simd::load<W>(norm + 2 * channels + channel)) {}
  EFFNET_INLINE simd::Float<W> operator()(simd::Float<W> x) const { return scale * (x - mean) + bias; }
};

// The gradient of W channels of y.
template <int W> struct GradientOf {
  Vectors<W> norm;
  simd::Float<W> of_grad, of_y, shift, gate, pool;
  Activation activation;
  DType dtype;
  EFFNET_INLINE GradientOf(const Gradient& g, DType dtype, int channels, int channel, int64_t image)
      : norm(g.norm, channels, channel),
        of_grad(simd::load<W>(g.coefficients + channel)),
        of_y(simd::load<W>(g.coefficients + channels + channel)),
        shift(simd::load<W>(g.coefficients + 2 * channels + channel)),
        gate(g.gate ? simd::load<W>(g.gate + image * channels + channel) : simd::Float<W>{} + 1.f),
        pool(g.pool ? simd::load<W>(g.pool + image * channels + channel) : simd::Float<W>{}),
        activation(g.activation),
        dtype(dtype) {}
  EFFNET_INLINE simd::Float<W> at(const Gradient& g, int64_t i) const {
    using namespace simd;
    const Float<W> y = load_any<W>(g.y, i, dtype);
    Float<W> grad = load_any<W>(g.grad, i, dtype) * gate + pool;
    if (activation != Activation::identity) grad *= activate_with_slope<W>(activation, norm(y)).slope;
    return of_grad * grad + (of_y * (y - norm.mean) + shift);
  }
};

// W doubles.
template <int W> struct Wide {
  typedef double Type __attribute__((vector_size(W * 8)));
};
template <int W> EFFNET_INLINE typename Wide<W>::Type widen(simd::Float<W> v) {
  return __builtin_convertvector(v, typename Wide<W>::Type);
}
template <int W> EFFNET_INLINE void add_to(double* totals, typename Wide<W>::Type v) {
  typename Wide<W>::Type total;
  memcpy(&total, totals, sizeof(total));
  total += v;
  memcpy(totals, &total, sizeof(total));
}

constexpr int kChunk = 16;  // floats added up before they join a total of doubles

// Of W channels while they are in registers. In doubles, so that a mean of many deviations leaves the variance its digits: of 1e4
// of them it has eight.
template <int W> struct Totals {
  typename Wide<W>::Type sum{}, squares{};
  EFFNET_INLINE void add(simd::Float<W> value) {
    const auto v = widen<W>(value);
    sum += v;
    squares += v * v;
  }
};

// What a thread works on, and the sums that it gathers: some numbers of lanes each, `lanes` being those of all blocks; for each
// image that it sees from first_image on, or for all images together.
struct Part {
  int64_t number, first, last;
  int64_t first_image = 0;
  std::vector<double> sums;
  void set_images(int64_t first, int64_t last, int64_t numbers) {
    first_image = first;
    sums.resize((last - first + 1) * numbers);
  }
};
using Gathered = std::vector<Part>;

// body(part) for up to `worth` parts of [0, units), a thread each.
template <typename F> Gathered in_parts(int64_t worth, int64_t units, const F& body) {
  const int64_t count = std::clamp<int64_t>(worth, 1, std::min<int64_t>(thread_count(), units));
  Gathered made(count);
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      made[i].number = i;
      made[i].first = units * i / count;
      made[i].last = units * (i + 1) / count;
      body(made[i]);
    }
  });
  return made;
}

// out[image, number, channel] = the sum of all parts', over `divisor`.
inline void add_up(const Gathered& parts, int64_t images, int numbers, int channels, int width, float* out, double divisor = 1) {
  const int64_t lanes = int64_t(blocks_of(channels, width)) * width, of_image = numbers * lanes;
  std::vector<double> totals(images * of_image);
  for (const Part& part : parts)
    for (size_t i = 0; i < part.sums.size(); ++i) totals[part.first_image * of_image + i] += part.sums[i];
  for (int64_t row = 0; row < images * numbers; ++row)
    for (int64_t lane = 0; lane < lanes; ++lane)
      out[row * channels + std::min<int64_t>(lane / width * width, channels - width) + lane % width] =
          float(totals[row * lanes + lane] / divisor);
}

// Mean and variance of `count` values a channel from their sums and those of their squares.
inline void finish_stats(const Gathered& parts, int64_t count, int channels, int width, float* mean, float* var) {
  const int64_t lanes = int64_t(blocks_of(channels, width)) * width;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t channel = std::min<int64_t>(lane / width * width, channels - width) + lane % width;
    double sum = 0, squares = 0;
    for (const Part& part : parts) {
      sum += part.sums[lane];
      squares += part.sums[lanes + lane];
    }
    const double center = sum / double(count);
    mean[channel] = float(center);
    var[channel] = float(std::max(squares / double(count) - center * center, 0.));
  }
}

}  // namespace effnet_fast::training
