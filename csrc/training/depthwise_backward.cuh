// The backward of training's depthwise convolution on CUDA: both gradients, and the sums that the norm before it needs, in one
// pass.
//
//   g      = of_grad * (grad * gate + pool) * activation'(norm(y)) + of_y * (y - mean) + shift       the gradient of y
//   z      = conv_transposed(g, w),  grad_w[tap] = sum g * shifted a,  a = activation(norm(x))
//   grad_x = z * activation'(norm(x)) + residual;  sums of z * activation' and of that times (x - mean)
//
// A thread owns one channel of 4 columns of x (8 of 3x3, stride 2) and slides down its rows. The K / S rows of g that a row of x
// meets stand in registers, each made once from grad and y: so a value of g in a register serves a multiply-add for z and one for
// grad_w. Stride S is S x S phases of taps, told apart when the loops are unrolled. The row after the present one is on its way.
// The taps stand in shared memory, to leave a 5x5 its registers.
// Bytes an element of x: (2 + 2 / stride^2) times 2 or 4, and one more where there is a residual. Operations: 2 k^2 / stride^2
// multiply-adds, about 15 instructions and two uses of the special function unit for a with its slope, and as much for each g, of
// which neighbouring strips make 1.25 (k3 s2) to 2 (k5) times as many as there are. By these counts HBM binds 3x3 on an H200, issue
// slots bind 5x5 in half types; not measured.
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

template <typename T_, int kKernel_, int kStride_> struct BackwardTraits : Window<kKernel_, kStride_> {
  using T = T_;
  static constexpr int kColumns = kKernel_ == 3 && kStride_ == 2 ? 8 : 4;
  static constexpr int kBlocks = kKernel_ == 5 && kStride_ == 1 ? 3 : 4;  // an SM
  static constexpr int kBefore = (kKernel_ - 1) / kStride_, kGColumns = kColumns / kStride_ + kBefore;
  static constexpr int kNumbers = 2 + kKernel_ * kKernel_, kSharedBytes = kWarps * kNumbers * kLanes * int(sizeof(float));
  // Rows and columns of x are counted from here, so that a tap's phase is known when it is compiled.
  static __host__ __device__ constexpr int origin(int padding) { return padding / kStride_ * kStride_; }
};

// Grid: x = 32 channels each, y = pieces.
template <class Tr> __global__ void __launch_bounds__(kLanes* kWarps, Tr::kBlocks)
    depthwise_backward_kernel(const BackwardLaunch p) {
  using T = typename Tr::T;
  constexpr int K = Tr::kKernel, S = Tr::kStride, C = Tr::kColumns, L = Tr::kLive, G = Tr::kGColumns;
  EFFNET_DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, c = blockIdx.x * kLanes + lane;
  float* const taps = shared + lane;  // of all warps
  float grad_taps[Tr::kTaps] = {}, sum = 0.f, sum_centred = 0.f;
  for (int tap = warp; c < p.channels && tap < Tr::kTaps; tap += kWarps) taps[tap * kLanes] = load_tap<Tr>(p, c, tap);
  __syncthreads();
  if (c < p.channels) {
    const ChannelNorm norm(p.read.norm, p.channels, c), y_norm(p.of_y.norm, p.channels, c);
    const ChannelCoefficients coefficients(p.of_y.coefficients, p.channels, c);
    const int x_row = p.width * p.channels, y_row = p.out_width * p.channels;
    const int top = Tr::origin(p.pad_top), left = Tr::origin(p.pad_left);
    const int rows = p.height + p.pad_top - top;

    for (int number = blockIdx.y * kWarps + warp; number < p.cut.tasks; number += gridDim.y * kWarps) {
      const Task task(p.cut, number, C);
      const int last = min(task.row + p.cut.rows, rows);
      const int column = task.column + left - p.pad_left, g_column = (task.column + left) / S - Tr::kBefore;
      const bool g_inside = g_column >= 0 && g_column + G <= p.out_width;
      const int64_t x_at = task.image * p.height * int64_t(x_row) + c, y_at = task.image * p.out_height * int64_t(y_row) + c;
      const T* const x = static_cast<const T*>(p.read.x) + x_at;
      const T* const y = static_cast<const T*>(p.of_y.y) + y_at;
      const T* const grad = static_cast<const T*>(p.of_y.grad) + y_at;
      const float gate = coefficients.of_grad * (p.of_y.gate ? p.of_y.gate[task.image * p.channels + c] : 1.f);
      const float pool = coefficients.of_grad * (p.of_y.pool ? p.of_y.pool[task.image * p.channels + c] : 0.f);

      T x_ahead[C], y_ahead[G], grad_ahead[G];
      float g[L][G];
      // Of row `row`, whose place in the loop's body is i: what is there.
      const auto x_row_of = [&](int row) { return row + top - p.pad_top; };
      const auto has_x = [&](int row) { return row >= task.row && row < last && unsigned(x_row_of(row)) < unsigned(p.height); };
      const auto g_row_of = [&](int row) { return (row + top) / S; };  // S divides row + top
      const auto has_g = [&](int row) { return row + top >= 0 && g_row_of(row) < p.out_height; };
      const auto fetch = [&](int row, bool with_g) {
        if (with_g && has_g(row)) {
          const int64_t at = int64_t(g_row_of(row)) * y_row;
          load_row(y_ahead, y + at, g_column, p.out_width, p.channels);
          load_row(grad_ahead, grad + at, g_column, p.out_width, p.channels);
        }
        if (has_x(row)) load_row(x_ahead, x + int64_t(x_row_of(row)) * x_row, column, p.width, p.channels);
      };

      fetch(task.row - Tr::kBodyRows, true);
      for (int row0 = task.row - Tr::kBodyRows; row0 < last; row0 += Tr::kBodyRows)
#pragma unroll
        for (int i = 0; i < Tr::kBodyRows; ++i) {
          const int row = row0 + i;
          if (i % S == 0) {
            float (&to)[G] = g[i / S];
            if (has_g(row)) {
              with_silu(p.y_range, [&](auto silu) {
#pragma unroll
                for (int q = 0; q < G; ++q) {
                  const float apart = to_float(y_ahead[q]) - y_norm.mean;
                  const float slope = activate_with_slope<silu.value>(p.y_range, y_norm.scale * apart + y_norm.bias).slope;
                  to[q] = (gate * to_float(grad_ahead[q]) + pool) * slope + (coefficients.of_y * apart + coefficients.shift);
                  if (!g_inside && unsigned(g_column + q) >= unsigned(p.out_width)) to[q] = 0.f;
                }
              });
            } else {
#pragma unroll
              for (int q = 0; q < G; ++q) to[q] = late_zero();
            }
          }
          T now[C];
#pragma unroll
          for (int t = 0; t < C; ++t) now[t] = x_ahead[t];
          fetch(row + 1, (i + 1) % S == 0);
          if (!has_x(row)) continue;

          float a[C], slope[C], z[C] = {};
          with_silu(p.range, [&](auto silu) {
#pragma unroll
            for (int t = 0; t < C; ++t) {
              const ValueAndSlope made = activate_with_slope<silu.value>(p.range, norm(to_float(now[t])));
              a[t] = unsigned(column + t) < unsigned(p.width) ? made.value : 0.f;
              slope[t] = made.slope;
            }
          });
#pragma unroll
          for (int u = 0; u < K; ++u) {
            if (!divides(S, i - u)) continue;
            const float (&of)[G] = g[slot_of(i, u, S, L)];
#pragma unroll
            for (int v = 0; v < K; ++v) {
              const float tap = taps[(u * K + v) * kLanes];
#pragma unroll
              for (int t = 0; t < C; ++t) {
                if (!divides(S, t - v)) continue;
                const float value = of[(t - v + K - 1) / S];
                z[t] += value * tap;
                grad_taps[u * K + v] += value * a[t];
              }
            }
          }
          const int64_t at = x_at + int64_t(x_row_of(row)) * x_row;
#pragma unroll
          for (int t = 0; t < C; ++t)
            if (unsigned(column + t) < unsigned(p.width)) {
              const float made = z[t] * slope[t];
              const int64_t to = at + int64_t(column + t) * p.channels;
              sum += made;
              sum_centred += made * (to_float(now[t]) - norm.mean);
              const float added = p.residual ? to_float(static_cast<const T*>(p.residual)[to]) : 0.f;
              if (p.grad_x) static_cast<T*>(p.grad_x)[to] = from_float<T>(made + added);
            }
        }
    }
  }
  __syncthreads();  // the taps are not read any more
  float* const mine = shared + warp * Tr::kNumbers * kLanes + lane;
  mine[0] = sum;
  mine[kLanes] = sum_centred;
#pragma unroll
  for (int tap = 0; tap < Tr::kTaps; ++tap) mine[(2 + tap) * kLanes] = grad_taps[tap];
  __syncthreads();
  for (int i = threadIdx.x; i < Tr::kNumbers * kLanes; i += kLanes * kWarps) {
    const int channel = blockIdx.x * kLanes + i % kLanes;
    float total = shared[i];
    for (int other = 1; other < kWarps; ++other) total += shared[other * Tr::kNumbers * kLanes + i];
    if (channel < p.channels) p.partial[(int64_t(blockIdx.y) * Tr::kNumbers + i / kLanes) * p.channels + channel] = total;
  }
}

}  // namespace effnet_fast::training
