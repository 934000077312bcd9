// The backward of training's depthwise convolution on CUDA: both gradients, and the sums that the norm before it needs, in one
// pass.
//
//   g      = of_grad * (grad * gate + pool) * activation'(norm(y)) + of_y * (y - mean) + shift       the gradient of y
//   z      = conv_transposed(g, w),  grad_w[tap] = sum g * shifted a,  a = activation(norm(x))
//   grad_x = z * activation'(norm(x)) + residual;  sums of z * activation' and of that times (x - mean)
//
// A block owns 32 channels; a lane one of them (two of 3x3, stride 1, where pixels are whole 16-byte pieces), of 4 columns of x (8
// with stride 2), and slides down its rows, which come by way of the warp's ring, two steps ahead. A row of x meets ceil(K / S)
// rows of g at most. They stand in registers, each made once from grad and y, so that a value of g serves a multiply-add for z and
// one for grad_w. Stride S is S x S phases of taps, told apart when the loops are unrolled. The taps stand in shared memory, to
// leave registers, and so do a group's sums, to which those of a thread go every few rows. Bytes an element of x: (2 + 2 /
// stride^2) times 2 or 4, and one more where there is a residual. Operations: 2 k^2 / stride^2 multiply-adds, about 15 instructions
// and two uses of the special function unit for a with its slope, and as much for each g, of which neighbouring strips make 1.25
// (k3 s2) to 2 (k5 s1) times as many as there are, and the segments of a strip some rows more. On an H200, in bf16 at a training
// batch of B0 and B5, 3x3 takes 1.5 to 3.3 and 5x5 2.5 to 6.3 times what its bytes do: issue slots bind, and fetches of
// instructions, since a body of L rows is unrolled.
#pragma once
#include "depthwise_common.cuh"

namespace effnet_fast::training {

struct BackwardLaunch : Depthwise {
  Cut cut;
  Range range, y_range;
  Gradient of_y;
  const void* residual;
  void* grad_x;
  float* partial;  // [pieces, 2 + kernel * kernel, channels]
};

template <class I> struct BackwardTraits : I {
  using typename I::T;
  static constexpr int kVector = I::kAligned && I::kKernel == 3 && I::kStride == 1 ? 2 : 1, kLanes = 32 / kVector;
  static constexpr int kGroups = kWarps * kVector;
  static constexpr int kColumns = I::kStride == 2 ? 8 : 4;
  static constexpr int kBlocks = I::kKernel == 3 && I::kStride == 2 ? 4 : I::kAligned ? 3 : 2;  // an SM, without spills
  static constexpr int kBefore = (I::kKernel - 1) / I::kStride, kGColumns = kColumns / I::kStride + kBefore;
  static constexpr int kNumbers = 2 + I::kTaps;
  // A step of the ring is kStride rows of x and one each of y and of grad.
  static constexpr int kSteps = 3, kXRow = kColumns * kVector * kTile, kGRow = kGColumns * kVector * kTile;
  static constexpr int kStep = I::kStride * kXRow + 2 * kGRow, kRing = kSteps * kStep;  // elements
  static constexpr int kTapBytes = I::kTaps * kTile * int(sizeof(float)),
                       kSumBytes = kNumbers * kGroups * kTile * int(sizeof(float));
  static constexpr int kSharedBytes = kTapBytes + kSumBytes + kWarps * kRing * int(sizeof(T));
  // Rows and columns of x are counted from here, so that a tap's phase is known when it is compiled.
  static __host__ __device__ constexpr int origin(int padding) { return padding / I::kStride * I::kStride; }
};

// Grid: x = kTile channels each, y = pieces.
template <class Tr> __global__ void __launch_bounds__(kThreads, Tr::kBlocks) depthwise_backward_kernel(const BackwardLaunch p) {
  using T = typename Tr::T;
  constexpr int K = Tr::kKernel, S = Tr::kStride, C = Tr::kColumns, L = Tr::kLive, G = Tr::kGColumns, V = Tr::kVector;
  constexpr unsigned kAll = (1u << C) - 1;
  constexpr int kFlushBodies = 4;  // sums leave registers then: no sum of floats is long
  EFFNET_DYNAMIC_SHARED(char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / Tr::kLanes, in_tile = lane % Tr::kLanes * V;
  const int c = blockIdx.x * kTile + in_tile, near = c < p.channels ? c : 0;
  float* const all_taps = reinterpret_cast<float*>(shared);
  float* const all_sums = reinterpret_cast<float*>(shared + Tr::kTapBytes);  // [numbers][groups][kTile]
  float* const sums = all_sums + (warp * V + group) * kTile + in_tile;
  T* const rings = reinterpret_cast<T*>(shared + Tr::kTapBytes + Tr::kSumBytes);
  const Place<Tr> place(rings + warp * Tr::kRing, lane);
  const int mine = pin(warp * Tr::kRing + group * kTile + in_tile);  // in the rings
  load_taps<Tr>(p, all_taps);
#pragma unroll
  for (int number = 0; number < Tr::kNumbers; ++number) store(sums + number * Tr::kGroups * kTile, Vec<float, V>{});
  __syncthreads();  // the taps are there
  const ChannelNorm<T, V> norm(p.read.norm, p.channels, near), y_norm(p.of_y.norm, p.channels, near);
  const ChannelCoefficients<T, V> coefficients(p.of_y.coefficients, y_norm, p.channels, near);
  const int x_row = p.width * p.channels, y_row = p.out_width * p.channels;
  const int top = Tr::origin(p.pad_top), left = Tr::origin(p.pad_left);
  const int rows = p.height + p.pad_top - top;

  for (int number = blockIdx.y * kWarps + warp; number < p.cut.tasks; number += gridDim.y * kWarps) {
    const Task task(p.cut, p.images, number, C, group, V);
    const int last = min(task.row + p.cut.rows, rows), first = task.row - Tr::kBodyRows;
    const int column = task.column + left - p.pad_left, g_column = (task.column + left) / S - Tr::kBefore;
    const Rows x_rows(max(task.row, p.pad_top - top), min(last, p.height + p.pad_top - top));
    const Rows g_rows(max(task.row - Tr::kBefore * S, -top), min(last, p.out_height * S - top));  // of x; S divides row + top
    const unsigned in = task.exists && c < p.channels ? columns_in<C>(column, p.width) : 0;
    const unsigned g_in = task.exists ? columns_in<G>(g_column, p.out_width) : 0;
    const int64_t x_first = (task.image * p.height + first + top - p.pad_top) * int64_t(x_row);
    const int64_t y_first = (task.image * p.out_height + (first + top) / S) * int64_t(y_row);
    Strip<Tr, C> x(place, static_cast<const T*>(p.read.x) + x_first, column, p.width, p, task.exists);
    Strip<Tr, G> y(place, static_cast<const T*>(p.of_y.y) + y_first, g_column, p.out_width, p, task.exists);
    Strip<Tr, G> grad(place, static_cast<const T*>(p.of_y.grad) + y_first, g_column, p.out_width, p, task.exists);
    int64_t out_at = x_first + int64_t(column) * p.channels + c;
    float gate[V], pool[V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int64_t at = task.image * p.channels + near + e;
      gate[e] = coefficients.of_grad[e] * (p.of_y.gate ? p.of_y.gate[at] : 1.f);
      pool[e] = coefficients.of_grad[e] * (p.of_y.pool ? p.of_y.pool[at] : 0.f);
    }

    float g[L][G][V], grad_taps[Tr::kTaps][V] = {}, sum[V] = {}, sum_centred[V] = {};
    const auto stage = [&](int row, int step) {
      if (g_rows.have(row)) {
        y.copy(place, step + S * Tr::kXRow, p.channels);
        grad.copy(place, step + S * Tr::kXRow + Tr::kGRow, p.channels);
      }
      y.next_row(y_row);
      grad.next_row(y_row);
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (x_rows.have(row + s)) x.copy(place, step + s * Tr::kXRow, p.channels);
        x.next_row(x_row);
      }
      copy_async_commit();
    };
    const auto flush = [&](int number, float (&of)[V]) {
      float* const to = sums + number * Tr::kGroups * kTile;
      Vec<float, V> total = load<V>(to);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        total.at[e] += of[e];
        of[e] = 0.f;
      }
      store(to, total);
    };

    __syncwarp();  // the last task's rows have been read
#pragma unroll
    for (int step = 0; step < Tr::kSteps - 1; ++step) stage(first + step * S, step * Tr::kStep);
    int step = 0, free_step = Tr::kRing - Tr::kStep, bodies = 0;
    for (int row0 = first; row0 < last; row0 += Tr::kBodyRows) {
#pragma unroll
      for (int i = 0; i < Tr::kBodyRows; ++i) {
        const int row = row0 + i;
        if (i % S == 0) {
          if (i > 0) step = step + Tr::kStep == Tr::kRing ? 0 : step + Tr::kStep;
          copy_async_wait<Tr::kSteps - 2>();
          __syncwarp();  // this step has landed for all, and all have read the one before
          stage(row + (Tr::kSteps - 1) * S, free_step);
          free_step = step;
          float (&to)[G][V] = g[i / S];
          if (g_rows.have(row)) {
            with_silu<Tr::kSilu>(p.y_range, [&](auto silu) {
#pragma unroll
              for (int q = 0; q < G; ++q) {
                const T* const at = rings + mine + step + S * Tr::kXRow + q * V * kTile;
                const auto of_y = Channels<T, V>::read(at), of_grad = Channels<T, V>::read(at + Tr::kGRow);
#pragma unroll
                for (int e = 0; e < V; ++e) {
                  const float slope = activate_with_slope<silu.value>(p.y_range, y_norm(of_y[e], e)).slope;
                  to[q][e] = (gate[e] * of_grad[e] + pool[e]) * slope + coefficients(of_y[e], e);
                }
              }
            });
            zero_outside(to, g_in);
          } else {
            zero_outside(to, 0);
          }
        }
        const int64_t out_row = out_at;
        out_at = pin(out_at + x_row);
        if (!x_rows.have(row)) continue;

        Channels<T, V> now[C];
        float a[C][V], slope[C][V], z[C][V] = {};
        with_silu<Tr::kSilu>(p.range, [&](auto silu) {
#pragma unroll
          for (int t = 0; t < C; ++t) {
            now[t] = Channels<T, V>::read(rings + mine + step + i % S * Tr::kXRow + t * V * kTile);
#pragma unroll
            for (int e = 0; e < V; ++e) {
              const ValueAndSlope made = activate_with_slope<silu.value>(p.range, norm(now[t][e], e));
              a[t][e] = made.value;
              slope[t][e] = made.slope;
            }
          }
        });
        if (in != kAll)
#pragma unroll
          for (int t = 0; t < C; ++t)
            if (!(in >> t & 1)) {
#pragma unroll
              for (int e = 0; e < V; ++e) a[t][e] = slope[t][e] = late_zero();
              now[t] = Channels<T, V>::of(a[t]);  // the ring has what it had there, which may be NaN
            }
#pragma unroll
        for (int u = 0; u < K; ++u) {
          if (!divides(S, i - u)) continue;
          const float (&of)[G][V] = g[slot_of(i, u, S, L)];
#pragma unroll
          for (int v = 0; v < K; ++v) {
            const Vec<float, V> tap = load<V>(all_taps + (u * K + v) * kTile + in_tile);
#pragma unroll
            for (int t = 0; t < C; ++t) {
              if (!divides(S, t - v)) continue;
#pragma unroll
              for (int e = 0; e < V; ++e) {
                const float value = of[(t - v + K - 1) / S][e];
                z[t][e] += value * tap.at[e];
                grad_taps[u * K + v][e] += value * a[t][e];
              }
            }
          }
        }
        float of_row[V] = {}, centred_of_row[V] = {};
#pragma unroll
        for (int t = 0; t < C; ++t)
#pragma unroll
          for (int e = 0; e < V; ++e) {
            z[t][e] *= slope[t][e];
            of_row[e] += z[t][e];
            centred_of_row[e] += z[t][e] * (now[t][e] - norm.mean[e]);
          }
#pragma unroll
        for (int e = 0; e < V; ++e) {
          sum[e] += of_row[e];
          sum_centred[e] += centred_of_row[e];
        }
        if (p.residual) {
          const T* from = static_cast<const T*>(p.residual) + out_row;
#pragma unroll
          for (int t = 0; t < C; ++t, from = pin_global(from + p.channels))
            if (in >> t & 1) {
              const auto added = Channels<T, V>::read(from);
#pragma unroll
              for (int e = 0; e < V; ++e) z[t][e] += added[e];
            }
        }
        if (p.grad_x) {
          T* to = static_cast<T*>(p.grad_x) + out_row;
#pragma unroll
          for (int t = 0; t < C; ++t, to = pin_global(to + p.channels))
            if (in >> t & 1) Channels<T, V>::of(z[t]).write(to);
        }
      }
      step = step + Tr::kStep == Tr::kRing ? 0 : step + Tr::kStep;
      if (++bodies % kFlushBodies && row0 + Tr::kBodyRows < last) continue;
      flush(0, sum);
      flush(1, sum_centred);
#pragma unroll
      for (int tap = 0; tap < Tr::kTaps; ++tap) flush(2 + tap, grad_taps[tap]);
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // all sums are there
  for (int i = threadIdx.x; i < Tr::kNumbers * kTile; i += kThreads) {
    const int channel = blockIdx.x * kTile + i % kTile;
    const float* const of = all_sums + i / kTile * Tr::kGroups * kTile + i % kTile;
    float total = of[0];
    for (int other = 1; other < Tr::kGroups; ++other) total += of[other * kTile];
    if (channel < p.channels) p.partial[(int64_t(blockIdx.y) * Tr::kNumbers + i / kTile) * p.channels + channel] = total;
  }
}

}  // namespace effnet_fast::training
