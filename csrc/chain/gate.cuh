// A squeeze-excite gate in a chain: a block takes a slice of an image's channels and makes all hidden units on its own. W_r is read
// by every one of them, which by the counts of chain.cuh costs less than one more meeting; where both weights fit they are in
// shared memory ahead.
#pragma once
#include "step.cuh"

namespace effnet_fast::chain {

constexpr int kSlice = 8, kRows = 4;  // a slice is a multiple of so many channels; rows of W_r that a warp takes at once

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

inline int plan_gate(Step& step, int blocks, int room) {
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

}  // namespace effnet_fast::chain
