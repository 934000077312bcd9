// The depthwise kernel without tensor cores: any type, any C. forward.cuh says when.
//
// A thread makes V channels x kColumns output columns, sliding down a segment of rows; neighbouring threads hold neighbouring
// channels, and thread numbers run on over strips of columns and images, so that no lane is idle whatever C is. The row after the
// present one is already on its way.
// Grid: x = channels x strips x images, y = segments.
#pragma once
#include "forward_common.cuh"

namespace effnet_fast::depthwise {

template <typename T_, int kKernel_, int kStride_, int kVector_> struct DirectTraits {
  using T = T_;
  static constexpr int kKernel = kKernel_, kStride = kStride_, kVector = kVector_, kColumns = 4, kThreads = 128;
  static constexpr int kTaps = kKernel * kKernel;
  static constexpr int kLive = ceil_div(kKernel, kStride), kBodyRows = kLive * kStride;
  static constexpr int kInColumns = (kColumns - 1) * kStride + kKernel;
  static constexpr int kSharedBytes = kThreads * kVector * kTaps * int(sizeof(float));
};

// At least 2 blocks an SM: left to itself ptxas aims at 3 for a 5x5, and spills.
template <class Tr> __global__ void __launch_bounds__(Tr::kThreads, 2) direct_kernel(const KernelParams p) {
  using T = typename Tr::T;
  constexpr int K = Tr::kKernel, S = Tr::kStride, V = Tr::kVector, TW = Tr::kColumns;
  using X = Vec<T, V>;
  EFFNET_DYNAMIC_SHARED(float, taps);
  const unsigned vectors = p.channels / V, strips = ceil_div(p.out_width, TW);
  const unsigned first = blockIdx.x * unsigned(Tr::kThreads), id = first + threadIdx.x, rest = id / vectors;
  const int vector = id % vectors, c = vector * V, strip = rest % strips, n = rest / strips;

  // The block's channels follow each other, from the last to the first: so do their weights, which go through shared memory
  // because a thread's own are a whole k * k apart from its neighbour's.
  {
    const int first_vector = first % vectors, elements = p.channels * Tr::kTaps;
    const int staged = min(int(vectors), Tr::kThreads) * V * Tr::kTaps;
    for (int i = threadIdx.x; i < staged; i += Tr::kThreads) {
      const int element = first_vector * V * Tr::kTaps + i;
      taps[i] = to_float(from_float<T>(load_float(p.weight, p.weight_dtype, element < elements ? element : element - elements)));
    }
    taps += (vector >= first_vector ? vector - first_vector : vector - first_vector + int(vectors)) * V * Tr::kTaps;
  }
  __syncthreads();
  if (n >= int(p.batch)) return;

  float w[Tr::kTaps][V], sum[V] = {};
#pragma unroll
  for (int tap = 0; tap < Tr::kTaps; ++tap)
#pragma unroll
    for (int v = 0; v < V; ++v) w[tap][v] = taps[v * Tr::kTaps + tap];
  Affine norm[V];
#pragma unroll
  for (int v = 0; v < V; ++v) norm[v] = fold_norm(p, c + v);

  const int first_out = blockIdx.y * p.segment, rows_out = min(p.segment, p.out_height - first_out);
  const int first_in = first_out * S - p.pad_top, rows_in = (rows_out - 1) * S + K;
  const int out_column = strip * TW, in_column = out_column * S - p.pad_left, columns_left = p.out_width - out_column;
  const int first_real = max(0, -first_in), real_rows = max(0, min(rows_in, p.height - first_in) - first_real);
  auto is_real = [&](int row) { return unsigned(row - first_real) < unsigned(real_rows); };
  const bool inside = in_column >= 0 && in_column + Tr::kInColumns <= p.width;
  const int64_t y_stride = int64_t(p.out_width) * p.channels;
  const int x_pixel = int(p.x_pixel);  // below 2^31 (forward.cuh)
  int64_t x = n * p.x_image + first_in * p.x_row + int64_t(in_column) * x_pixel + c;
  T* y = static_cast<T*>(p.y) + (int64_t(n) * p.out_height + first_out) * y_stride + int64_t(out_column) * p.channels + c;

  auto load_row = [&](X(&to)[Tr::kInColumns], int row) {
    const int64_t start = x;
    x += p.x_row;
    if (!is_real(row)) return;
    if (inside) {  // nearly every strip: no predicates
      const T* at = static_cast<const T*>(p.x) + start;
#pragma unroll
      for (int i = 0; i < Tr::kInColumns; ++i, at += x_pixel) to[i] = load<V>(at);
    } else {
#pragma unroll
      for (int i = 0; i < Tr::kInColumns; ++i) {
        to[i] = X{};
        if (unsigned(in_column + i) < unsigned(p.width))
          to[i] = load<V>(static_cast<const T*>(p.x) + (start + int64_t(i) * x_pixel));
      }
    }
  };

  X ahead[Tr::kInColumns];
  float acc[Tr::kLive][TW][V];
  load_row(ahead, 0);
  for (int row0 = 0; row0 < rows_in; row0 += Tr::kBodyRows)
#pragma unroll
    for (int i = 0; i < Tr::kBodyRows; ++i) {
      const int row = row0 + i;
      float now[Tr::kInColumns][V];
#pragma unroll
      for (int t = 0; t < Tr::kInColumns; ++t)
#pragma unroll
        for (int v = 0; v < V; ++v) now[t][v] = to_float(ahead[t].at[v]);
      load_row(ahead, row + 1);
      if (is_real(row)) {
#pragma unroll
        for (int u = 0; u < K; ++u) {
          if (!divides(S, i - u)) continue;
          float (&a)[TW][V] = acc[slot_of(i, u, S, Tr::kLive)];
#pragma unroll
          for (int s = 0; s < K; ++s)
#pragma unroll
            for (int t = 0; t < TW; ++t)
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const float product = now[t * S + s][v] * w[u * K + s][v];
                a[t][v] = u == 0 && s == 0 ? product : a[t][v] + product;
              }
        }
      } else if (i % S == 0) {
#pragma unroll
        for (int t = 0; t < TW; ++t)
#pragma unroll
          for (int v = 0; v < V; ++v) acc[i / S % Tr::kLive][t][v] = late_zero();
      }
      if (divides(S, i - (K - 1))) {
        const int past = row - (K - 1);
        if (unsigned(past) < unsigned(rows_out * S)) {
          float (&a)[TW][V] = acc[slot_of(i, K - 1, S, Tr::kLive)];
          auto finish = [&](auto silu) {
            T* to = y;
#pragma unroll
            for (int t = 0; t < TW; ++t, to += p.channels)
              if (t < columns_left) {
                X stored;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                  const float value = activate<decltype(silu)::value>(a[t][v] * norm[v].scale + norm[v].shift, p);
                  stored.at[v] = from_float<T>(value);
                  sum[v] += to_float(stored.at[v]);
                }
                store(to, stored);
              }
          };
          if (p.activation == Activation::silu) {  // costs nothing here: FFMA and addresses fill the loop
            finish(std::true_type{});
          } else {
            finish(std::false_type{});
          }
          y += y_stride;
        }
      }
    }
  if (!p.partial) return;
  const int64_t piece = int64_t(n) * p.pieces + blockIdx.y * strips + strip;
#pragma unroll
  for (int v = 0; v < V; ++v) p.partial[piece * p.channels + c + v] = sum[v];
}

}  // namespace effnet_fast::depthwise
