// Whole networks of few images in one launch on CUDA, half types: a stem, depthwise convolutions, squeeze-excite gates, 1x1
// convolutions, the mean and the classifier, one after the other, each what the kernel of its own would make (../conv,
// ../depthwise,
// ../squeeze_excite, ../pointwise). For one image B0 is 67 such steps of 1 to 4 us, of which the most is the end of one kernel and
// the start of the next.
//
// A block lies on every SM from the first step to the last, 8 warps, and between two steps all blocks meet at a barrier, whose two
// halves are an addition and a look at a number in L2. What a step needs that no step makes comes before that look: its parameters,
// weights of the first product, taps, norms, and both weights of a gate where they fit. Then what is left is a trip to L2 for x,
// what is computed of it, and a trip to write it.
//
//   stem        From 3 channels, 3x3. A thread takes a pixel x 8 channels, FFMA; the taps are fp32 in shared memory. Neighbours share x in L1.
//   depthwise   A block takes a piece of an image's output pixels x 32 channels; a thread one pixel at a time x 4 channels, FFMA, x
//               from global memory: neighbours share it in L1. Taps are fp32 in shared memory. The sums of the piece are partial.
//   gate        A block takes a slice of an image's channels and makes all hidden units on its own: W_r is read by every one of
//               them, which costs less than one more meeting.
//   pointwise   A warp takes a tile of 16 pixels x 16 or 32 channels, or a part of its depth, and adds up with others in shared
//               memory. There is no ring and no ldmatrix: 32 input channels are two products, and in which order a product takes
//               them is free as long as both sides take the same, so that a lane loads 8 in a row of its own pixel, and of its own
//               row of the weight, straight into the fragments. Which column of the fragment is which channel is free too: a lane
//               writes 4 or 8 in a row.
//   mean        A block takes an image's 64 channels, a thread 4 of them of every 16th pixel.
//
// Bytes and operations are those of the kernels of the steps; what binds is latency. By the counts of an H200 (a trip to L2 0.3 us,
// a meeting two of them) B0's 67 steps should take some 0.12 ms; no GPU has run this yet. How many warps share what is chosen by
// such counts too (plan_step).
//
// Sums have a fixed order: an answer does not depend on the run, only on the number of SMs.
#pragma once
#include <algorithm>
#include <climits>

#include "../common/epilogue.cuh"
#include "../common/grid.h"
#include "../common/tensor_core.h"
#include "params.h"

namespace effnet_fast::chain {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kGroup = 32, kLanes = kGroup / 4, kSlots = kThreads / kLanes;  // depthwise: channels, threads of a pixel, pixels
constexpr int kStagedBytes = 128 << 10;  // of shared memory at most, where weights of gates are staged: the rest of it is L1
constexpr int kSlice = 8, kRows = 4;     // gate: a slice is a multiple of so many channels; rows of W_r that a warp takes at once

// What a launch takes of parameters: 32,764 bytes since CUDA 12.1.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr size_t kParameterBytes = 4096;
#else
constexpr size_t kParameterBytes = 32764;
#endif
constexpr size_t kMostSteps = (kParameterBytes - 16) / sizeof(Step);

struct Program {
  Step steps[kMostSteps];
  int count;
  unsigned* barrier;
};
static_assert(sizeof(Program) <= kParameterBytes);

// Activations of pairs: what follows a norm that before_silu has been asked of.
struct Ending {
  bool silu;
  float low, high;
};
__device__ __forceinline__ Ending ending_of(Activation activation) {
  return {activation == Activation::silu, activation == Activation::identity ? -INFINITY : 0.f,
          activation == Activation::relu6 ? 6.f : INFINITY};
}
template <typename T> __device__ __forceinline__ void end(const Ending& ending, float& a, float& b) {
  if (ending.silu) {
    silu_of_two<T>(a, b);
  } else {
    a = clamp(a, ending.low, ending.high), b = clamp(b, ending.low, ending.high);
  }
}

// What a pixel of 8 output channels, from the lane's on, sees of x, times its taps: weights [in_channels][3][3][channels].
template <typename T, typename Source> __device__ __forceinline__ void add_stem_taps(const conv::Params& p, const float* weights,
                                                                                     int64_t image, int row, int column,
                                                                                     float (&v)[8]) {
  constexpr bool kBytes = std::is_same_v<Source, uint8_t>;
  constexpr int kMost = 3;  // input channels
  const Source* const x = pin_global(static_cast<const Source*>(p.x) + image * p.x_image);
  float seen[kMost][9];
#pragma unroll
  for (int c = 0; c < kMost; ++c)
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int y_at = row + tap / 3, x_at = column + tap % 3;
      const bool real = c < p.in_channels && unsigned(y_at) < unsigned(p.height) && unsigned(x_at) < unsigned(p.width);
      seen[c][tap] = real ? to_float(x[c * p.x_channel + y_at * p.x_row + x_at * p.x_pixel]) : 0.f;
      if constexpr (kBytes)  // rounded as the images that other kernels are given
        if (real) seen[c][tap] = to_float(from_float<T>(seen[c][tap] * p.pixels[c] + p.pixels[p.in_channels + c]));
    }
#pragma unroll
  for (int c = 0; c < kMost; ++c) {
    if (c == p.in_channels) break;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vec<float, 4> w = load<4>(weights + ((c * 9 + tap) * p.channels + 4 * half));
#pragma unroll
        for (int e = 0; e < 4; ++e) v[4 * half + e] += seen[c][tap] * w.at[e];
      }
  }
}

template <typename T, typename Wait> __device__ __forceinline__ void stem_step(const Step& step, char* memory, const Wait& wait) {
  const conv::Params& p = step.stem;
  const int taps = p.in_channels * 9;
  float* const weights = reinterpret_cast<float*>(memory);
  Affine* const norms = reinterpret_cast<Affine*>(weights + taps * p.channels);
  const Ending ending = ending_of(p.activation);
  for (int i = threadIdx.x; i < taps * p.channels; i += kThreads)
    weights[i % taps * p.channels + i / taps] = to_float(static_cast<const T*>(p.weight)[i]);
  if (int(threadIdx.x) < p.channels) norms[threadIdx.x] = before_silu<T>(fold_norm(p, threadIdx.x), ending.silu);
  wait();
  const int pixels = p.out_height * p.out_width;
  for (int i = int(blockIdx.x) * kThreads + threadIdx.x; i < step.items; i += gridDim.x * kThreads) {
    const int channel = i % step.across * 8, at = i / step.across, pixel = at % pixels;
    const int row = pixel / p.out_width * p.stride - p.pad_top, column = pixel % p.out_width * p.stride - p.pad_left;
    float v[8] = {};
    if (p.pixels) {
      add_stem_taps<T, uint8_t>(p, weights + channel, at / pixels, row, column, v);
    } else {
      add_stem_taps<T, T>(p, weights + channel, at / pixels, row, column, v);
    }
    Vec<uint32_t, 4> out;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const Vec<Affine, 2> norm = load<2>(norms + channel + e);
      float v0 = v[e] * norm.at[0].scale + norm.at[0].shift, v1 = v[e + 1] * norm.at[1].scale + norm.at[1].shift;
      end<T>(ending, v0, v1);
      out.at[e / 2] = round_pair<T>(v0, v1);
    }
    store(reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + (int64_t(at) * p.channels + channel)), out);
  }
}

// Memory of a mean: the sums of each 16th pixel, of 64 channels.
constexpr int kMeanGroup = 64, kMeanLanes = kMeanGroup / 4, kMeanSlots = kThreads / kMeanLanes;
using MeanWork = Vec<float, kMeanGroup>[kMeanSlots];

template <typename T, typename Wait> __device__ __forceinline__ void pool_step(const Step& step, char* memory, const Wait& wait) {
  const pool::Params& p = step.pool;
  auto& sums = *reinterpret_cast<MeanWork*>(memory);
  const int lane = threadIdx.x % kMeanLanes * 4, slot = threadIdx.x / kMeanLanes;
  wait();
  for (int item = blockIdx.x; item < step.items; item += gridDim.x) {
    const int first_channel = item % step.across * kMeanGroup, channels = min(kMeanGroup, p.channels - first_channel);
    const int64_t image = item / step.across;
    if (item != int(blockIdx.x)) __syncthreads();  // the sums before are read
    float sum[4] = {};
    const T* const x = pin_global(static_cast<const T*>(p.x) + (image * p.pixels * p.channels + first_channel + lane));
    if (lane < channels)
#pragma unroll 4
      for (int pixel = slot; pixel < p.pixels; pixel += kMeanSlots) {
        const Vec<uint32_t, 2> v = load<2>(reinterpret_cast<const uint32_t*>(x + int64_t(pixel) * p.channels));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += value_of<T>(v, e);
      }
    store(sums[slot].at + lane, Vec<float, 4>{sum[0], sum[1], sum[2], sum[3]});
    __syncthreads();  // all sums are there
    if (int(threadIdx.x) >= channels) continue;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kMeanSlots; ++i) total += sums[i].at[threadIdx.x];
    static_cast<T*>(p.y)[image * p.channels + first_channel + threadIdx.x] = from_float<T>(total / float(p.pixels));
  }
}

// Memory of a depthwise step.
template <int kKernel> struct DepthwiseWork {
  Vec<float, kGroup> taps[kKernel * kKernel];
  Affine norms[kGroup];
  float sums[kWarps][kGroup];
};

template <typename T, int kKernel, typename Wait>
__device__ __forceinline__ void depthwise_step(const Step& step, char* memory, const Wait& wait) {
  const depthwise::ForwardParams& p = step.depthwise;
  auto& work = *reinterpret_cast<DepthwiseWork<kKernel>*>(memory);
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const int pixels = p.out_height * p.out_width;
  const Ending ending = ending_of(p.activation);
  bool first = true;
  for (int item = blockIdx.x; item < step.items || first; item += gridDim.x) {
    const bool works = item < step.items;
    const int first_channel = item % step.across * kGroup, piece = item / step.across % step.parts;
    const int64_t image = item / step.across / step.parts;
    const int channels = works ? min(kGroup, p.channels - first_channel) : 0;
    if (!first) __syncthreads();  // the piece before is done
    for (int i = threadIdx.x; i < channels * kKernel * kKernel; i += kThreads) {
      const T tap = static_cast<const T*>(p.weight)[int64_t(first_channel) * kKernel * kKernel + i];
      work.taps[i % (kKernel * kKernel)].at[i / (kKernel * kKernel)] = to_float(tap);
    }
    if (int(threadIdx.x) < channels)
      work.norms[threadIdx.x] = before_silu<T>(fold_norm(p, first_channel + threadIdx.x), ending.silu);
    if (first) {
      wait();
    } else {
      __syncthreads();
    }
    first = false;
    if (!works) break;

    const int channel = lane * 4;
    const bool inside = channel < channels;
    const char* const x = pin_global(static_cast<const char*>(p.x) + 2 * (image * p.x_image + first_channel + channel));
    const int row_bytes = int(p.x_row) * 2, pixel_bytes = int(p.x_pixel) * 2;
    T* const y = static_cast<T*>(p.y) + (image * pixels * p.channels + first_channel + channel);
    const int last = int(int64_t(piece + 1) * pixels / step.parts);
    float sums[4] = {};
    for (int pixel = int(int64_t(piece) * pixels / step.parts) + slot; inside && pixel < last; pixel += kSlots) {
      const int row = pixel / p.out_width * p.stride - p.pad_top, column = pixel % p.out_width * p.stride - p.pad_left;
      const char* rows[kKernel];
      unsigned columns[kKernel];  // bytes from the first column of the image on
      bool row_inside[kKernel], column_inside[kKernel];
#pragma unroll
      for (int i = 0; i < kKernel; ++i) {
        row_inside[i] = unsigned(row + i) < unsigned(p.height);
        rows[i] = x + int64_t(row + i) * row_bytes;
        column_inside[i] = unsigned(column + i) < unsigned(p.width);
        columns[i] = unsigned(column + i) * pixel_bytes;
      }
      Vec<uint32_t, 2> seen[kKernel * kKernel];
#pragma unroll
      for (int i = 0; i < kKernel; ++i)
#pragma unroll
        for (int j = 0; j < kKernel; ++j) {
          seen[i * kKernel + j] = {};
          if (row_inside[i] && column_inside[j])
            seen[i * kKernel + j] = load<2>(reinterpret_cast<const uint32_t*>(rows[i] + columns[j]));
        }
      float v[4] = {};
#pragma unroll
      for (int tap = 0; tap < kKernel * kKernel; ++tap) {
        const Vec<float, 4> taps = load<4>(work.taps[tap].at + channel);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] += value_of<T>(seen[tap], e) * taps.at[e];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = v[e] * work.norms[channel + e].scale + work.norms[channel + e].shift;
      end<T>(ending, v[0], v[1]);
      end<T>(ending, v[2], v[3]);
      const Vec<uint32_t, 2> out{round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3])};
      store(reinterpret_cast<uint32_t*>(y + int64_t(pixel) * p.channels), out);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] += value_of<T>(out, e);
    }
    if (p.pieces == 0) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 8);
      sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 16);
    }
    if (threadIdx.x % 32 < kLanes) store(work.sums[threadIdx.x / 32] + channel, Vec<float, 4>{sums[0], sums[1], sums[2], sums[3]});
    __syncthreads();  // all warps' sums are there
    if (int(threadIdx.x) < channels) {
      float sum = 0.f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += work.sums[warp][threadIdx.x];
      p.partial[(image * p.pieces + piece) * p.channels + first_channel + threadIdx.x] = sum;
    }
  }
}

// Memory of a gate: sums of shares of the pieces, then the mean, [C] in front, in memory for 4 kThreads floats or whole turns of so
// many; the hidden units; W_r and the slice of W_e where they are staged.
__host__ __device__ __forceinline__ int gate_hidden_at(int channels) { return ceil_div(channels, 4 * kThreads) * 4 * kThreads * 4; }
__host__ __device__ __forceinline__ int gate_weights_at(int channels, int reduced) {
  return gate_hidden_at(channels) + (reduced + 3) / 4 * 16;
}

template <typename T, typename Wait> __device__ __forceinline__ void gate_step(const Step& step, char* memory, const Wait& wait) {
  const squeeze_excite::GateParams& p = step.gate;
  const int C = p.channels, R = p.reduced, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const mean = reinterpret_cast<float*>(memory);
  float* const hidden = reinterpret_cast<float*>(memory + gate_hidden_at(C));
  char* const weights = memory + gate_weights_at(C, R);
  const int64_t reduce_bytes = int64_t(C) * R * 2;
  bool first = true;
  for (int item = blockIdx.x; item < step.items || first; item += gridDim.x) {
    const bool works = item < step.items;
    const int64_t image = item / step.across;
    const int first_channel = item % step.across * step.parts, channels = min(step.parts, C - first_channel);
    const T* reduce = static_cast<const T*>(p.reduce_weight);
    const T* expand = static_cast<const T*>(p.expand_weight) + int64_t(first_channel) * R;  // the slice's rows
    if (!first) __syncthreads();
    if (works && step.staged) {
      const Shared to = shared_address(weights);
      for (int i = threadIdx.x * 16; i < reduce_bytes; i += kThreads * 16)
        copy_async(to + i, reinterpret_cast<const char*>(reduce) + i, 16);
      for (int i = threadIdx.x * 16; i < channels * R * 2; i += kThreads * 16)
        copy_async(to + (int(reduce_bytes) + i), reinterpret_cast<const char*>(expand) + i, 16);
      copy_async_commit();
      reduce = reinterpret_cast<const T*>(weights);
      expand = reinterpret_cast<const T*>(weights + reduce_bytes);
    }
    if (first) wait();
    first = false;
    if (!works) break;

    // Threads side by side take 4 channels each, of pieces `share` and on.
    const int across = min(C / 4, kThreads), shares = kThreads / across, share = threadIdx.x / across;
    if (share < shares) {
      for (int c = threadIdx.x % across * 4; c < C; c += 4 * kThreads) {
        const float* const from = pin_global(p.partial + (image * p.pieces * C + c));
        float sum[4] = {};
#pragma unroll 8
        for (int piece = share; piece < p.pieces; piece += shares) {
          const Vec<float, 4> v = load<4>(from + int64_t(piece) * C);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[e] += v.at[e];
        }
        store(mean + share * C + c, Vec<float, 4>{sum[0], sum[1], sum[2], sum[3]});
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += kThreads) {
      float sum = mean[c];
      for (int i = 1; i < shares; ++i) sum += mean[i * C + c];
      mean[c] = sum / p.count;
    }
    copy_async_wait<0>();
    __syncthreads();  // the mean and the weights are there

    for (int first_row = warp * kRows; first_row < R; first_row += kWarps * kRows) {
      float sums[kRows] = {};
#pragma unroll 2
      for (int c = lane * 8; c < C; c += 32 * 8) {
        const Vec<float, 4> low = load<4>(mean + c), high = load<4>(mean + c + 4);
        Vec<uint32_t, 4> w[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          w[r] = load<4>(reinterpret_cast<const uint32_t*>(reduce + int64_t(min(first_row + r, R - 1)) * C + c));
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < 8; ++e) sums[r] += value_of<T>(w[r], e) * (e < 4 ? low : high).at[e % 4];
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], lanes);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (lane != r || first_row + r >= R) continue;
        const float bias = p.reduce_bias ? to_float(static_cast<const T*>(p.reduce_bias)[first_row + r]) : 0.f;
        hidden[first_row + r] = activate(p.activation, sums[r] + bias);
      }
    }
    __syncthreads();  // the hidden units are there

    // 8 lanes a channel.
    for (int base = 0; base < channels; base += kThreads / 8) {
      const int c = base + int(threadIdx.x) / 8;
      float sum = 0.f;
      for (int r = threadIdx.x % 8; c < channels && r < R; r += 8) sum += to_float(expand[c * R + r]) * hidden[r];
#pragma unroll
      for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (threadIdx.x % 8 == 0 && c < channels) {
        const float bias = p.expand_bias ? to_float(static_cast<const T*>(p.expand_bias)[first_channel + c]) : 0.f;
        p.gate[image * C + first_channel + c] = activate(Activation::sigmoid, sum + bias);
      }
    }
  }
}

// Of input channels, 32 each that a tile of `width` times 8 channels has under way at once.
__host__ __device__ constexpr int ahead(int width) { return width == 4 ? 2 : 4; }
// Memory of a 1x1 convolution: sums of warps that share a tile, then the gates.
__host__ __device__ __forceinline__ int gates_at(const Step& step) { return step.parts > 1 ? kThreads * step.width * 16 : 0; }

template <typename T, int kWidth, typename Wait>
__device__ __forceinline__ void pointwise_step(const Step& step, char* memory, const Wait& wait) {
  constexpr int kAhead = ahead(kWidth);
  const pointwise::Params& p = step.pointwise;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int C = p.in_channels, K = p.out_channels, rows = int(p.rows), pixels = int(p.pixels);
  const int part = warp % step.parts, together = kWarps / step.parts;  // tiles that a block has under way at once
  const int chunks = ceil_div(C, 32), each = ceil_div(chunks, step.parts);
  const int first_chunk = part * each, last_chunk = min(chunks, first_chunk + each);
  const int share = ceil_div(step.items, int(gridDim.x)), first = blockIdx.x * share, last = min(first + share, step.items);
  const Ending ending = ending_of(p.activation);
  const Vec<uint32_t, 4> zeros{};

  uint32_t* const gates = reinterpret_cast<uint32_t*>(memory + gates_at(step));  // of T, [images][C]

  Affine norm{};  // of channel `lane` of the tile's
  Vec<uint32_t, 4> a[kAhead][2], b[kAhead][kWidth];
  int tile, row, column;  // the lane's: rows g and g + 8 of 16 from `row` on, 2 kWidth channels from `column` on
  const T *x[2], *weight;
  int images[2];  // of these rows
  // mma's column g of product t is channel 2 t + g % 2 of those of lane g / 2.
  auto load_b = [&](int chunk) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
#pragma unroll
      for (int t = 0; t < kWidth; ++t) {
        const int c = (chunk + u) * 32 + q * 8;
        const bool real = chunk + u < last_chunk && c < C;
        b[u][t] = real ? load<4>(reinterpret_cast<const uint32_t*>(weight + (2 * t * C + c))) : zeros;
      }
  };
  auto load_a = [&](int chunk) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = (chunk + u) * 32 + q * 8;
        a[u][h] = chunk + u < last_chunk && c < C ? load<4>(reinterpret_cast<const uint32_t*>(x[h] + c)) : zeros;
      }
  };
  for (int base = first; base < last || base == first; base += together) {
    tile = base + warp / step.parts;
    const bool works = tile < last;
    if (works) {
      row = tile / step.across * 16;
      const int tile_column = tile % step.across * 8 * kWidth;
      column = tile_column + q * 2 * kWidth;
      const int weight_row = min(tile_column + g / 2 * 2 * kWidth, K - 2 * kWidth) + g % 2;
      weight = pin_global(static_cast<const T*>(p.weight) + int64_t(weight_row) * C);
      load_b(first_chunk);
      if (part == 0) norm = before_silu<T>(fold_norm(p, min(tile_column + lane, K - 1)), ending.silu);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int my_row = min(row + g + 8 * h, rows - 1);
        x[h] = pin_global(static_cast<const T*>(p.x) + int64_t(my_row) * C);
        images[h] = my_row / pixels;
      }
    }
    if (base == first) wait();
    Vec<uint32_t, kWidth> rest[2] = {};
    if (works) {
      load_a(first_chunk);
      if (p.residual && part == 0 && column < K)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          rest[h] = load<kWidth>(reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.residual) +
                                                                   (int64_t(min(row + g + 8 * h, rows - 1)) * K + column)));
    }
    if (base == first && p.gate) {
      for (int i = threadIdx.x * 4; i < rows / pixels * C; i += kThreads * 4) {
        const Vec<float, 4> v = load<4>(pin_global(p.gate + i));
        store(gates + i / 2, Vec<uint32_t, 2>{round_pair<T>(v.at[0], v.at[1]), round_pair<T>(v.at[2], v.at[3])});
      }
      __syncthreads();  // the gates are there
    }
    float acc[kWidth][4] = {};
    for (int chunk = first_chunk; works && chunk < last_chunk; chunk += kAhead) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (chunk + u >= last_chunk) break;
        const int c = (chunk + u) * 32 + q * 8;
        if (p.gate)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Vec<uint32_t, 4> gate = load<4>(gates + (images[h] * C + min(c, C - 8)) / 2);  // past the end x is zero
#pragma unroll
            for (int e = 0; e < 4; ++e) a[u][h].at[e] = multiply_pair<T>(a[u][h].at[e], gate.at[e]);
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t both[4] = {a[u][0].at[2 * half], a[u][1].at[2 * half], a[u][0].at[2 * half + 1], a[u][1].at[2 * half + 1]};
#pragma unroll
          for (int t = 0; t < kWidth; ++t) mma_k16(T(), acc[t], both, b[u][t].at[2 * half], b[u][t].at[2 * half + 1]);
        }
      }
      if (chunk + kAhead < last_chunk) load_a(chunk + kAhead), load_b(chunk + kAhead);
    }
    if (step.parts > 1) {
      float* const sums = reinterpret_cast<float*>(memory) + lane * 4;  // [warp][product][lane][4]
      auto place = [&](int of, int t) { return sums + (of * kWidth + t) * 32 * 4; };
      if (base != first) __syncthreads();  // those of the tiles before are read
      if (part > 0)
#pragma unroll
        for (int t = 0; t < kWidth; ++t) store(place(warp, t), Vec<float, 4>{acc[t][0], acc[t][1], acc[t][2], acc[t][3]});
      __syncthreads();
      for (int other = 1; part == 0 && other < step.parts; ++other)
#pragma unroll
        for (int t = 0; t < kWidth; ++t) {
          const Vec<float, 4> v = load<4>(place(warp + other, t));
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[t][e] += v.at[e];
        }
    }
    if (part > 0 || !works) continue;
    Vec<uint32_t, kWidth> out[2];
#pragma unroll
    for (int t = 0; t < kWidth; ++t) {
      float scale[2], shift[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i] = __shfl_sync(0xffffffffu, norm.scale, (q * kWidth + t) * 2 + i);
        shift[i] = __shfl_sync(0xffffffffu, norm.shift, (q * kWidth + t) * 2 + i);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v0 = acc[t][2 * h] * scale[0] + shift[0], v1 = acc[t][2 * h + 1] * scale[1] + shift[1];
        end<T>(ending, v0, v1);
        if (p.residual) v0 += value_of<T>(rest[h], 2 * t), v1 += value_of<T>(rest[h], 2 * t + 1);
        out[h].at[t] = round_pair<T>(v0, v1);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (column < K && row + g + 8 * h < rows)
        store(reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + (int64_t(row + g + 8 * h) * K + column)), out[h]);
  }
}

constexpr int kStepBytes = (sizeof(Step) + 63) / 64 * 64;
static_assert(2 * kStepBytes % alignof(DepthwiseWork<5>) == 0);

template <typename T> __global__ void __launch_bounds__(kThreads, 1) chain_kernel(EFFNET_GRID_CONSTANT(Program, program)) {
  EFFNET_DYNAMIC_SHARED(char, shared);
  char* const memory = shared + 2 * kStepBytes;
  // Parameters of two steps: that which runs and the next.
  auto fetch = [&](int i) {
    constexpr int kWords = sizeof(Step) / 4;
    static_assert(sizeof(Step) % 4 == 0 && kWords <= kThreads - 32);
    if (const int word = int(threadIdx.x) - (kThreads - kWords); word >= 0)  // not the thread that looks at the barrier
      reinterpret_cast<uint32_t*>(shared + i % 2 * kStepBytes)[word] = reinterpret_cast<const uint32_t*>(program.steps + i)[word];
  };
  fetch(0);
  __syncthreads();
  unsigned before = 0;
  for (int i = 0; i < program.count; ++i) {
    const Step& step = *reinterpret_cast<const Step*>(shared + i % 2 * kStepBytes);
    // A step calls it once, when it has all that no step makes.
    auto wait = [&] {
      if (i + 1 < program.count) fetch(i + 1);
      if (i == 0) {
        __syncthreads();
      } else {
        grid_wait(program.barrier, before);
      }
    };
    if (step.kind == Kind::stem) {
      stem_step<T>(step, memory, wait);
    } else if (step.kind == Kind::pool) {
      pool_step<T>(step, memory, wait);
    } else if (step.kind == Kind::gate) {
      gate_step<T>(step, memory, wait);
    } else if (step.kind == Kind::depthwise) {
      if (step.depthwise.kernel == 3) {
        depthwise_step<T, 3>(step, memory, wait);
      } else {
        depthwise_step<T, 5>(step, memory, wait);
      }
    } else if (step.width == 2) {
      pointwise_step<T, 2>(step, memory, wait);
    } else {
      pointwise_step<T, 4>(step, memory, wait);
    }
    if (i + 1 < program.count) before = grid_arrive(program.barrier);
  }
}

// Clocks that a 1x1 convolution takes, by what binds it: trips to L2, of which a tile has one for each kAhead * 32 input channels;
// the bytes that a multiprocessor reads; and the sums of warps that share a tile.
inline double pointwise_clocks(const pointwise::Params& p, int width, int parts, int blocks) {
  constexpr double kTrip = 600, kBytesAClock = 32, kMeeting = 150, kSum = 8;
  const int chunks = ceil_div(p.in_channels, 32), each = ceil_div(chunks, parts);
  const int64_t tiles = ceil_div(p.rows, int64_t{16}) * ceil_div(p.out_channels, 8 * width),
                share = ceil_div(tiles, int64_t(blocks));
  const int64_t rounds = ceil_div(share * parts, int64_t(kWarps));
  const double bytes = double(share) * chunks * 64 * (16 + 8 * width);
  const double sums = parts > 1 ? kMeeting + kSum * width * parts : 0;
  return double(rounds) * (ceil_div(each, ahead(width)) * kTrip + sums) + bytes / kBytesAClock;
}

// Deals a step out to that many blocks, each of which has `room` bytes of shared memory. Returns how many of them it takes.
inline int plan_step(Step& step, int blocks, int room) {
  step.staged = false;
  step.width = 0;
  if (step.kind == Kind::stem) {
    const conv::Params& p = step.stem;
    step.across = p.channels / 8;
    step.items = int(p.batch) * p.out_height * p.out_width * step.across;
    return p.channels * (p.in_channels * 9 * int(sizeof(float)) + int(sizeof(Affine)));
  }
  if (step.kind == Kind::pool) {
    step.across = ceil_div(step.pool.channels, kMeanGroup);
    step.items = int(step.pool.batch) * step.across;
    return sizeof(MeanWork);
  }
  if (step.kind == Kind::depthwise) {
    const depthwise::ForwardParams& p = step.depthwise;
    const int pixels = p.out_height * p.out_width;
    step.across = ceil_div(p.channels, kGroup);
    step.parts = p.pieces > 0 ? p.pieces : int(std::clamp<int64_t>(blocks / (step.across * p.batch), 1, pixels));
    step.items = int(p.batch) * step.parts * step.across;
    return p.kernel == 3 ? sizeof(DepthwiseWork<3>) : sizeof(DepthwiseWork<5>);
  }
  if (step.kind == Kind::gate) {
    const squeeze_excite::GateParams& p = step.gate;
    constexpr int kReaders = 32;  // of W_r at the same time: each at the rate of one multiprocessor, all at that of L2
    const int slices = int(std::clamp<int64_t>(std::min(blocks, kReaders) / p.batch, 1, ceil_div(p.channels, kSlice)));
    step.parts = ceil_div(ceil_div(p.channels, slices), kSlice) * kSlice;
    step.across = ceil_div(p.channels, step.parts);
    step.items = int(p.batch) * step.across;
    const int64_t bytes = gate_weights_at(p.channels, p.reduced), weights = int64_t(p.channels + step.parts) * p.reduced * 2;
    step.staged = bytes + weights <= room;
    return int(step.staged ? bytes + weights : bytes);
  }
  const pointwise::Params& p = step.pointwise;
  double least = INFINITY;
  for (int width = 2; width <= 4; width *= 2)
    for (int parts = 1; parts <= std::min(kWarps, ceil_div(p.in_channels, 32)); parts *= 2) {
      const double clocks = pointwise_clocks(p, width, parts, blocks);
      if (clocks >= least) continue;
      least = clocks;
      step.width = width;
      step.parts = parts;
    }
  step.across = ceil_div(p.out_channels, 8 * step.width);
  step.items = int(ceil_div(p.rows, int64_t{16})) * step.across;
  return gates_at(step) + (p.gate ? int(p.rows / p.pixels) * p.in_channels * 2 : 0);
}

// Starts the steps in as few launches as they take, and returns how many, on a GPU of that many multiprocessors, of which a block
// may have so much shared memory.
template <typename T>
int launch(const std::vector<Step>& steps, unsigned* barrier, int multiprocessors, int shared_bytes, void* stream) {
  const int room = std::min(shared_bytes, kStagedBytes) - 2 * kStepBytes;
  EFFNET_ALLOW_SHARED(chain_kernel<T>, shared_bytes);
  int launches = 0;
  for (size_t first = 0; first < steps.size(); first += kMostSteps, ++launches) {
    Program program;
    int bytes = 2 * kStepBytes;
    program.count = int(std::min(steps.size() - first, kMostSteps));
    program.barrier = barrier;
    for (int i = 0; i < program.count; ++i) {
      program.steps[i] = steps[first + i];
      bytes = std::max(bytes, 2 * kStepBytes + plan_step(program.steps[i], multiprocessors, room));
    }
    launch_together(chain_kernel<T>, multiprocessors, kThreads, bytes, stream, program);
  }
  return launches;
}

}  // namespace effnet_fast::chain
