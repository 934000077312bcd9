// Training's depthwise convolution on CUDA, channels_last:  y = conv(activation(norm(x)), w), and y's mean and variance per channel
// from the same pass, added up in fixed order (no atomics; the same bits each time).
//
// A thread makes one or two channels of 4 or 8 output columns, sliding down a segment of rows: a row of x is read from the warp's
// ring, activated in registers, and added to the K / S rows of y that it belongs to.
// Deviations are taken from the mean of the thread's first row, rounded as y is, and added up in doubles row by row, so that the
// variance loses few digits. Bytes an output: 2 or 4 times (stride^2 + 1). Operations: k^2 multiply-adds and, since neighbouring
// strips both need the columns between them, 1.1 (k3 s2) to 2 (k5 s1) activations with two uses of the special function unit each.
// On an H200, in bf16 at a training batch of B0 and B5, 3x3 takes 1.7 to 4.2 and 5x5 3.0 to 5.6 times what its bytes do: issue
// slots bind, and with stride 2 the special function unit.
#pragma once
#include "depthwise_common.cuh"

namespace effnet_fast::training {

struct StatsLaunch : Depthwise {
  Cut cut;
  Range range;
  void* y;
  float* partial;  // [pieces, 3, channels]
};

template <class I> struct StatsTraits : I {
  using typename I::T;
  static constexpr int kVector = I::kAligned ? 2 : 1, kLanes = 32 / kVector, kGroups = kWarps * kVector;
  static constexpr int kColumns = I::kStride == 1 ? (I::kKernel == 3 ? 8 : 4) : 4;
  static constexpr int kInColumns = (kColumns - 1) * I::kStride + I::kKernel;
  static constexpr int kBlocks = I::kKernel == 3 && sizeof(T) == 2 ? 4 : 3;  // an SM, without spills
  static constexpr int kSteps = I::kStride == 1 ? 4 : 3;                     // of kStride rows each, in the ring
  static constexpr int kTapBytes = I::kTaps * kTile * int(sizeof(float));
  static constexpr int kStep = I::kStride * kInColumns * kVector * kTile, kRing = kSteps * kStep;  // elements
  static constexpr int kSharedBytes = std::max(kTapBytes + kWarps * kRing * int(sizeof(T)), kGroups * kTile * int(sizeof(Moments)));
};

// Grid: x = kTile channels each, y = pieces.
template <class Tr> __global__ void __launch_bounds__(kThreads, Tr::kBlocks) depthwise_stats_kernel(const StatsLaunch p) {
  using T = typename Tr::T;
  using Exact = std::conditional_t<sizeof(T) == 4, double, float>;  // in floats the differences of halves are
  constexpr int K = Tr::kKernel, S = Tr::kStride, C = Tr::kColumns, L = Tr::kLive, V = Tr::kVector;
  EFFNET_DYNAMIC_SHARED(char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / Tr::kLanes, in_tile = lane % Tr::kLanes * V;
  const int c = blockIdx.x * kTile + in_tile, near = c < p.channels ? c : 0;
  float* const all_taps = reinterpret_cast<float*>(shared);
  T* const rings = reinterpret_cast<T*>(shared + Tr::kTapBytes);
  const Place<Tr> place(rings + warp * Tr::kRing, lane);
  const int mine = pin(warp * Tr::kRing + group * kTile + in_tile);  // in the rings
  load_taps<Tr>(p, all_taps);
  __syncthreads();  // the taps are there
  Vec<float, V> taps[Tr::kTaps];
#pragma unroll
  for (int tap = 0; tap < Tr::kTaps; ++tap) taps[tap] = load<V>(all_taps + tap * kTile + in_tile);
  const ChannelNorm<T, V> norm(p.read.norm, p.channels, near);
  const int x_row = p.width * p.channels, y_row = p.out_width * p.channels;
  float shift[V] = {};
  double sum[V] = {}, squares[V] = {};
  int count = 0;

  for (int number = blockIdx.y * kWarps + warp; number < p.cut.tasks; number += gridDim.y * kWarps) {
    const Task task(p.cut, p.images, number, C, group, V);
    const int rows_out = min(p.cut.rows, p.out_height - task.row);
    const int columns_out = task.exists && c < p.channels ? min(C, p.out_width - task.column) : 0;
    const int first_in = task.row * S - p.pad_top, rows_in = (rows_out - 1) * S + K, in_column = task.column * S - p.pad_left;
    const Rows real(max(0, -first_in), min(rows_in, p.height - first_in));
    const unsigned in = columns_in<Tr::kInColumns>(in_column, p.width);
    Strip<Tr, Tr::kInColumns> x(place, static_cast<const T*>(p.read.x) + (task.image * p.height + first_in) * int64_t(x_row),
                                in_column, p.width, p, task.exists);
    int64_t y_at = (task.image * p.out_height + task.row) * int64_t(y_row) + int64_t(task.column) * p.channels + c;
    const auto stage = [&](int row, int step) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (real.have(row + s)) x.copy(place, step + s * x.kRow, p.channels);
        x.next_row(x_row);
      }
      copy_async_commit();
    };

    __syncwarp();  // the last task's rows have been read
#pragma unroll
    for (int step = 0; step < Tr::kSteps - 1; ++step) stage(step * S, step * Tr::kStep);
    int step = 0, free_step = Tr::kRing - Tr::kStep;
    float made[L][C][V];
    for (int row0 = 0; row0 < rows_in; row0 += Tr::kBodyRows) {
#pragma unroll
      for (int i = 0; i < Tr::kBodyRows; ++i) {
        const int row = row0 + i;
        if (i % S == 0) {
          if (i > 0) step = step + Tr::kStep == Tr::kRing ? 0 : step + Tr::kStep;
          copy_async_wait<Tr::kSteps - 2>();
          __syncwarp();  // this step has landed for all, and all have read the one before
          stage(row + (Tr::kSteps - 1) * S, free_step);
          free_step = step;
        }
        if (real.have(row)) {
          float now[Tr::kInColumns][V];
          with_silu<Tr::kSilu>(p.range, [&](auto silu) {
#pragma unroll
            for (int t = 0; t < Tr::kInColumns; ++t) {
              const auto read = Channels<T, V>::read(rings + mine + step + i % S * x.kRow + t * V * kTile);
#pragma unroll
              for (int e = 0; e < V; ++e) now[t][e] = activate_with_slope<silu.value>(p.range, norm(read[e], e)).value;
            }
          });
          zero_outside(now, in);
#pragma unroll
          for (int u = 0; u < K; ++u) {
            if (!divides(S, i - u)) continue;
            float (&a)[C][V] = made[slot_of(i, u, S, L)];
#pragma unroll
            for (int v = 0; v < K; ++v)
#pragma unroll
              for (int t = 0; t < C; ++t)
#pragma unroll
                for (int e = 0; e < V; ++e) {
                  const float product = now[t * S + v][e] * taps[u * K + v].at[e];
                  a[t][e] = u == 0 && v == 0 ? product : a[t][e] + product;
                }
          }
        } else if (i % S == 0) {
#pragma unroll
          for (int t = 0; t < C; ++t)
#pragma unroll
            for (int e = 0; e < V; ++e) made[i / S % L][t][e] = late_zero();
        }
        if (!divides(S, i - (K - 1)) || unsigned(row - (K - 1)) >= unsigned(rows_out * S)) continue;
        float (&a)[C][V] = made[slot_of(i, K - 1, S, L)];
        if (count == 0)
#pragma unroll
          for (int e = 0; e < V; ++e) {
            float of_first = 0.f;
#pragma unroll
            for (int t = 0; t < C; ++t) of_first += t < columns_out ? a[t][e] : 0.f;
            shift[e] = to_float(from_float<T>(of_first * reciprocal_fast(float(max(columns_out, 1)))));
          }
        count += columns_out;
        if (columns_out < C)
#pragma unroll
          for (int t = 0; t < C; ++t)
            if (t >= columns_out)
#pragma unroll
              for (int e = 0; e < V; ++e) a[t][e] = shift[e];  // no deviation
        Exact of_row[V] = {};
        float squares_of_row[V] = {};
        T* to = static_cast<T*>(p.y) + y_at;
#pragma unroll
        for (int t = 0; t < C; ++t, to = pin_global(to + p.channels)) {
          const auto stored = Channels<T, V>::of(a[t]);
          if (t < columns_out) stored.write(to);
#pragma unroll
          for (int e = 0; e < V; ++e) {
            const Exact apart = Exact(stored[e]) - shift[e];
            of_row[e] += apart;
            squares_of_row[e] += float(apart) * float(apart);
          }
        }
        y_at = pin(y_at + y_row);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          sum[e] += of_row[e];
          squares[e] += squares_of_row[e];
        }
      }
      step = step + Tr::kStep == Tr::kRing ? 0 : step + Tr::kStep;
    }
  }

  copy_async_wait<0>();
  __syncthreads();  // the taps and rows are not read any more
  Moments* const moments = reinterpret_cast<Moments*>(shared);
#pragma unroll
  for (int e = 0; e < V; ++e)  // deviations from shift, as values
    moments[(warp * V + group) * kTile + in_tile + e] = {double(count), sum[e] + double(count) * shift[e],
                                                         squares[e] + (2. * sum[e] + double(count) * shift[e]) * shift[e]};
  __syncthreads();
  const int channel = blockIdx.x * kTile + threadIdx.x;
  if (threadIdx.x >= kTile || channel >= p.channels) return;
  Moments total = moments[threadIdx.x];
  for (int other = 1; other < Tr::kGroups; ++other) total.join(moments[other * kTile + threadIdx.x]);
  write_piece(total, p.partial, blockIdx.y, p.channels, channel);
}

}  // namespace effnet_fast::training
