// Training's depthwise convolution on CUDA, channels_last:  y = conv(activation(norm(x)), w), and y's mean and variance per channel
// from the same pass, merged by Chan's formula in fixed order (no atomics; the same bits each time).
//
// A thread makes one channel of 4 output columns (8 of 3x3, stride 1), sliding down a segment of rows: a row of x enters registers,
// is activated there, and is added to the K / S rows of y that it belongs to. The row after the present one is already on its way.
// Deviations are taken from the thread's first output, and added up in doubles row by row, so that the variance loses few digits.
// Bytes an output: 2 or 4 times (stride^2 + 1). Operations: k^2 multiply-adds and, since neighbouring strips both need the columns
// between them, 1.25 (k3 s1) to 2.75 (k5 s2) activations with two uses of the special function unit each. By these counts HBM binds
// but 5x5 of stride 1 in half types, which issue slots bind; on an H200, not measured.
#pragma once
#include "depthwise_common.cuh"

namespace effnet_fast::training {

struct StatsLaunch : Depthwise {
  Cut cut;
  Range range;
  void* y;
  float* partial;  // [pieces, 3, channels]
};

template <typename T_, int kKernel_, int kStride_> struct StatsTraits : Window<kKernel_, kStride_> {
  using T = T_;
  static constexpr int kColumns = kKernel_ == 3 && kStride_ == 1 ? 8 : 4, kInColumns = (kColumns - 1) * kStride_ + kKernel_;
  static constexpr int kSharedBytes = kWarps * kLanes * int(sizeof(Moments));
};

// Grid: x = 32 channels each, y = pieces.
template <class Tr> __global__ void __launch_bounds__(kLanes* kWarps, 4) depthwise_stats_kernel(const StatsLaunch p) {
  using T = typename Tr::T;
  constexpr int K = Tr::kKernel, S = Tr::kStride, C = Tr::kColumns, L = Tr::kLive;
  EFFNET_DYNAMIC_SHARED(Moments, shared);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, c = blockIdx.x * kLanes + lane;
  Moments moments{};
  if (c < p.channels) {
    float taps[Tr::kTaps], first = 0.f;
    double sum = 0., squares = 0.;
#pragma unroll
    for (int tap = 0; tap < Tr::kTaps; ++tap) taps[tap] = load_tap<Tr>(p, c, tap);
    const ChannelNorm norm(p.read.norm, p.channels, c);
    const int x_row = p.width * p.channels, y_row = p.out_width * p.channels;
    int count = 0;

    for (int number = blockIdx.y * kWarps + warp; number < p.cut.tasks; number += gridDim.y * kWarps) {
      const Task task(p.cut, number, C);
      const int rows_out = min(p.cut.rows, p.out_height - task.row), columns_out = min(C, p.out_width - task.column);
      const int first_in = task.row * S - p.pad_top, rows_in = (rows_out - 1) * S + K, in_column = task.column * S - p.pad_left;
      const bool inside = in_column >= 0 && in_column + Tr::kInColumns <= p.width;
      const T* x = static_cast<const T*>(p.read.x) + task.image * p.height * int64_t(x_row) + c;
      T* y = static_cast<T*>(p.y) + (task.image * p.out_height + task.row) * int64_t(y_row) + int64_t(task.column) * p.channels + c;
      const auto is_real = [&](int row) { return row < rows_in && unsigned(first_in + row) < unsigned(p.height); };

      T ahead[Tr::kInColumns];
      float made[L][C];
      if (is_real(0)) load_row(ahead, x + first_in * int64_t(x_row), in_column, p.width, p.channels);
      for (int row0 = 0; row0 < rows_in; row0 += Tr::kBodyRows)
#pragma unroll
        for (int i = 0; i < Tr::kBodyRows; ++i) {
          const int row = row0 + i;
          float now[Tr::kInColumns];
          if (is_real(row))
            with_silu(p.range, [&](auto silu) {
#pragma unroll
              for (int t = 0; t < Tr::kInColumns; ++t) {
                now[t] = activate_with_slope<silu.value>(p.range, norm(to_float(ahead[t]))).value;
                if (!inside && unsigned(in_column + t) >= unsigned(p.width)) now[t] = 0.f;
              }
            });
          if (is_real(row + 1)) load_row(ahead, x + (first_in + row + 1) * int64_t(x_row), in_column, p.width, p.channels);
          if (i % S == 0) {
#pragma unroll
            for (int t = 0; t < C; ++t) made[i / S % L][t] = late_zero();
          }
          if (is_real(row)) {
#pragma unroll
            for (int u = 0; u < K; ++u) {
              if (!divides(S, i - u)) continue;
              float (&a)[C] = made[slot_of(i, u, S, L)];
#pragma unroll
              for (int v = 0; v < K; ++v)
#pragma unroll
                for (int t = 0; t < C; ++t) a[t] += now[t * S + v] * taps[u * K + v];
            }
          }
          if (!divides(S, i - (K - 1)) || unsigned(row - (K - 1)) >= unsigned(rows_out * S)) continue;
          const float (&a)[C] = made[slot_of(i, K - 1, S, L)];
          T* to = y;
          y += y_row;
          if (count == 0) first = to_float(from_float<T>(a[0]));
          count += columns_out;
          float of_row = 0.f, squares_of_row = 0.f;
#pragma unroll
          for (int t = 0; t < C; ++t, to += p.channels)
            if (t < columns_out) {
              *to = from_float<T>(a[t]);
              const float apart = to_float(from_float<T>(a[t])) - first;
              of_row += apart;
              squares_of_row += apart * apart;
            }
          sum += of_row;
          squares += squares_of_row;
        }
    }
    if (count > 0) moments = {double(count), first + sum / count, squares - sum * (sum / count)};
  }
  shared[warp * kLanes + lane] = moments;
  __syncthreads();
  if (warp > 0 || c >= p.channels) return;
  for (int other = 1; other < kWarps; ++other) moments.join(shared[other * kLanes + lane]);
  float* const to = p.partial + int64_t(blockIdx.y) * 3 * p.channels + c;
  to[0] = float(moments.count);
  to[p.channels] = float(moments.mean);
  to[2 * int64_t(p.channels)] = float(moments.squares > 0. ? moments.squares : 0.);
}

}  // namespace effnet_fast::training
