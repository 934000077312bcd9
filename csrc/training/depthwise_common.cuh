// What training's depthwise kernels share: how work is cut, the norm and activation of what they read, and how the sums that blocks
// gather apart become one.
//
// A warp owns 32 channels, one a lane, so that whether rows and columns are inside the image is the same for all of it. Its tasks
// are strips of columns of a segment of rows of an image, in turn; what it adds up stays in registers until the last. Then the four
// warps of a block add theirs up in shared memory, and each block writes one piece; a second kernel adds pieces up in fixed order.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/sliding.cuh"
#include "params.h"

namespace effnet_fast::training {

constexpr int kLanes = 32, kWarps = 4;

template <int kKernel_, int kStride_> struct Window {
  static constexpr int kKernel = kKernel_, kStride = kStride_, kTaps = kKernel * kKernel;
  static constexpr int kLive = ceil_div(kKernel, kStride), kBodyRows = kLive * kStride;  // of the loop over rows
};

// How many tasks there are: strips of columns by segments of `rows` rows, of each image; and blocks for each 32 channels.
struct Cut {
  int strips, segments, rows, pieces, tasks;
};

// As many segments as give each multiprocessor eight blocks, each segment some times as long as what it repeats of the one before.
inline Cut cut_of(const Depthwise& p, int width, int height, int columns, int body_rows, int multiprocessors) {
  const int strips = ceil_div(width, columns), bodies = ceil_div(height, body_rows);
  const int64_t tiles = ceil_div(p.channels, kLanes), wanted = std::max<int64_t>(8 * multiprocessors / tiles, 1);
  const int64_t whole = p.images * strips, longest = std::max(bodies / 4, 1);
  const int segments = int(std::clamp<int64_t>(wanted * kWarps / whole, 1, longest));
  Cut cut{strips, 0, ceil_div(bodies, segments) * body_rows, 0, 0};
  cut.segments = ceil_div(height, cut.rows);
  constexpr int64_t limit = std::numeric_limits<int>::max() / 2;
  if (whole * cut.segments > limit || std::max(int64_t(p.width), int64_t(p.out_width)) * p.channels > limit)
    throw std::runtime_error("depthwise: the images are too many or too wide for one launch");
  cut.tasks = int(whole * cut.segments);
  cut.pieces = int(std::min<int64_t>(wanted, ceil_div(cut.tasks, kWarps)));
  return cut;
}

struct Task {
  int64_t image;
  int row, column;  // its first, of those that were cut
  __device__ __forceinline__ Task(const Cut& cut, int number, int columns) {
    const int rest = number / cut.strips;
    column = number % cut.strips * columns;
    row = rest % cut.segments * cut.rows;
    image = rest / cut.segments;
  }
};

// Of one channel, of the rows of a [3, channels]. What is read as it is has the mean 0, the scale 1, the bias 0.
struct ChannelNorm {
  float mean = 0.f, scale = 1.f, bias = 0.f;
  __device__ __forceinline__ ChannelNorm(const float* rows, int channels, int channel) {
    if (!rows) return;
    mean = rows[channel];
    scale = rows[channels + channel];
    bias = rows[2 * channels + channel];
  }
  __device__ __forceinline__ float operator()(float x) const { return scale * (x - mean) + bias; }
};

struct ChannelCoefficients {
  float of_grad, of_y, shift;
  __device__ __forceinline__ ChannelCoefficients(const float* rows, int channels, int channel)
      : of_grad(rows[channel]), of_y(rows[channels + channel]), shift(rows[2 * channels + channel]) {}
};

// SiLU, or a clamp from low to high: relu, relu6, identity. Its slope is 0 from flat_below down and from flat_above up, which are
// NaN where there is no such end: then not even infinity is beyond it.
struct Range {
  bool silu;
  float low, high, flat_below, flat_above;
  explicit Range(Activation activation)
      : silu(activation == Activation::silu),
        low(activation == Activation::identity ? -INFINITY : 0.f),
        high(activation == Activation::relu6 ? 6.f : INFINITY),
        flat_below(activation == Activation::identity ? NAN : 0.f),
        flat_above(activation == Activation::relu6 ? 6.f : NAN) {}
};

struct ValueAndSlope {
  float value, slope;
};

template <bool kSilu> __device__ __forceinline__ ValueAndSlope activate_with_slope(const Range& range, float u) {
  if constexpr (kSilu) {
    const float sigmoid = reciprocal_fast(1.f + exp2_fast(-1.4426950408889634f * u)), value = u * sigmoid;
    return {value, sigmoid + value * (1.f - sigmoid)};
  } else {
    return {clamp(u, range.low, range.high), u <= range.flat_below || u >= range.flat_above ? 0.f : 1.f};
  }
}

// Calls f(std::true_type) for SiLU, f(std::false_type) for a clamp: a branch around a row, not one around each element.
template <typename F> __device__ __forceinline__ void with_silu(const Range& range, const F& f) {
  if (range.silu) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

template <class W> __device__ __forceinline__ float load_tap(const Depthwise& p, int channel, int tap) {
  return load_float(p.weight, p.weight_dtype, int64_t(channel) * W::kTaps + tap);
}

// Columns [first, first + N) of a row of one channel; those outside the image are zeros.
template <int N, typename T>
__device__ __forceinline__ void load_row(T (&to)[N], const T* row, int first, int width, int channels) {
  if (first >= 0 && first + N <= width) {  // nearly every strip: no predicates
    const T* at = row + int64_t(first) * channels;
#pragma unroll
    for (int i = 0; i < N; ++i, at += channels) to[i] = *at;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = T{};
      if (unsigned(first + i) < unsigned(width)) to[i] = row[int64_t(first + i) * channels];
    }
  }
}

// Mean, and sum of squared deviations from it, of `count` values. In doubles, to which a thread adds once a row.
struct Moments {
  double count, mean, squares;
  __device__ __forceinline__ void join(const Moments& other) {
    if (other.count == 0.) return;
    const double all = count + other.count, apart = other.mean - mean, share = other.count / all;
    mean += apart * share;
    squares += other.squares + apart * apart * count * share;
    count = all;
  }
};

constexpr int kRows = 8;  // of threads, each with every eighth piece, in the kernels that end the work

// mean[c] and var[c] of pieces [pieces, 3, channels]: count, mean, squares. Grid: x = 32 channels each.
__global__ void __launch_bounds__(kLanes* kRows)
    finish_stats_kernel(const float* partial, int pieces, int channels, float* mean, float* var) {
  EFFNET_DYNAMIC_SHARED(Moments, shared);
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes, c = blockIdx.x * kLanes + lane;
  Moments moments{};
  for (int piece = row; c < channels && piece < pieces; piece += kRows) {
    const float* at = partial + int64_t(piece) * 3 * channels + c;
    moments.join({at[0], at[channels], at[2 * int64_t(channels)]});
  }
  shared[row * kLanes + lane] = moments;
  __syncthreads();
  if (row > 0 || c >= channels) return;
  for (int other = 1; other < kRows; ++other) moments.join(shared[other * kLanes + lane]);
  mean[c] = float(moments.mean);
  var[c] = float(moments.squares / moments.count);
}

// Sums of pieces [pieces, numbers, channels]: the first two to sums [2, channels], the others to grad_weight [channels, numbers -
// 2]; null: not wanted. Grid: x = 32 channels each, y = numbers.
__global__ void __launch_bounds__(kLanes* kRows)
    finish_sums_kernel(const float* partial, int pieces, int channels, float* sums, float* grad_weight) {
  EFFNET_DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes, c = blockIdx.x * kLanes + lane;
  const int number = blockIdx.y, numbers = gridDim.y;
  float* const to = number < 2 ? sums : grad_weight;
  if (!to) return;
  float sum = 0.f;
  for (int piece = row; c < channels && piece < pieces; piece += kRows)
    sum += partial[(int64_t(piece) * numbers + number) * channels + c];
  shared[row * kLanes + lane] = sum;
  __syncthreads();
  if (row > 0 || c >= channels) return;
  for (int other = 1; other < kRows; ++other) sum += shared[other * kLanes + lane];
  to[number < 2 ? int64_t(number) * channels + c : int64_t(c) * (numbers - 2) + number - 2] = sum;
}

}  // namespace effnet_fast::training
