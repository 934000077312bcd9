// The squeeze-excite gate on CUDA:  gate = sigmoid(W_e . act(W_r . s + b_r) + b_e),  s = sum_p partial / count, all fp32.
//
// A row of an FC belongs to a group of 1 to 32 lanes of a warp, which read it 16 bytes a lane and add up with shuffles; the
// input vector is in shared memory. The order of every sum is fixed: no atomics.
//
//   gate_kernel                    a block owns an image and does everything: many images, or weights so few that one SM reads
//                                  them sooner than a second launch starts.
//   reduce_kernel, expand_kernel   a block owns a slice of the rows of one FC for one image: few images. Each reduce block sums
//                                  the partials again, from L2; the hidden units pass through global memory.
//
// Bytes an image: 4 P C in, 4 C out and 2 C R weights, the last from L2 for all images but the first; 2 C R multiply-adds, that
// is one for each weight read. So weight reads bind (one SM takes in about 127 GB/s, B7's 2.46 MB of fp32 weights in one gate
// would keep it for 19 us): with many images by L2, which reusing a weight for several images a block would relieve.
#pragma once
#include "../common/cuda.h"
#include "params.h"

namespace effnet_fast::squeeze_excite {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSM = 4;             // at least; left to itself the compiler aims at more, and spills
constexpr int64_t kWholeBytes = 128 << 10;  // weights up to which one block does it all: about 1 us of one SM's reading
constexpr int kExpandChannels = 32;         // least rows of the expand FC worth a block

// A lane's share of a row times x: every `lanes`-th vector of V elements, from its own on.
template <int V, typename T>
__device__ __forceinline__ float row_share(const T* row, const float* x, int inner, int member, int lanes) {
  float sum = 0.f;
#pragma unroll 4
  for (int i = member * V; i < inner; i += lanes * V) {
    const Vec<T, V> weight = load<V>(row + i);
#pragma unroll
    for (int k = 0; k < V; ++k) sum += to_float(weight.at[k]) * x[i + k];
  }
  return sum;
}

// y[row] = activation(bias[row] + weight[row] . x) for rows [first, last), by the whole block.
template <typename T> __device__ __forceinline__ void fully_connected(const void* weights, const void* biases, const float* x,
                                                                      int inner, int first, int last, Activation activation,
                                                                      float* y) {
  constexpr int V = 16 / sizeof(T);
  const T* weight = static_cast<const T*>(weights);
  const T* bias = static_cast<const T*>(biases);
  const bool vectors = inner % V == 0 && aligned16(weight);
  int lanes = 32;
  while (lanes > 1 && lanes / 2 * (vectors ? V : 1) >= inner) lanes /= 2;
  const int lane = threadIdx.x % 32, member = lane % lanes, rows_a_warp = 32 / lanes;
  // Trip counts are the same for a whole warp: every lane must come to the shuffles.
  for (int base = first + int(threadIdx.x) / 32 * rows_a_warp; base < last; base += kWarps * rows_a_warp) {
    const int row = base + lane / lanes;
    float sum = 0.f;
    if (row < last) {
      const T* mine = weight + int64_t(row) * inner;
      sum = vectors ? row_share<V>(mine, x, inner, member, lanes) : row_share<1>(mine, x, inner, member, lanes);
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (row < last && member == 0) y[row] = activate(activation, sum + (bias ? to_float(bias[row]) : 0.f));
  }
}

template <int V> __device__ __forceinline__ void squeeze_vectors(const GateParams& p, int64_t image, float* squeezed) {
  const float* partial = p.partial + image * p.pieces * p.channels;
  for (int c = threadIdx.x * V; c < p.channels; c += kThreads * V) {
    Vec<float, V> sum = load<V>(partial + c);
    for (int piece = 1; piece < p.pieces; ++piece) {
      const Vec<float, V> next = load<V>(partial + int64_t(piece) * p.channels + c);
#pragma unroll
      for (int k = 0; k < V; ++k) sum.at[k] += next.at[k];
    }
#pragma unroll
    for (int k = 0; k < V; ++k) squeezed[c + k] = sum.at[k] / p.count;
  }
}

__device__ __forceinline__ void squeeze(const GateParams& p, int64_t image, float* squeezed) {
  if (p.channels % 4 == 0 && aligned16(p.partial)) {
    squeeze_vectors<4>(p, image, squeezed);
  } else {
    squeeze_vectors<1>(p, image, squeezed);
  }
}

// Grid: images.
template <typename T> __global__ void __launch_bounds__(kThreads, kBlocksPerSM) gate_kernel(const GateParams p) {
  EFFNET_DYNAMIC_SHARED(float, squeezed);  // [channels], then the hidden units, [reduced]
  float* hidden = squeezed + p.channels;
  squeeze(p, blockIdx.x, squeezed);
  __syncthreads();
  fully_connected<T>(p.reduce_weight, p.reduce_bias, squeezed, p.channels, 0, p.reduced, p.activation, hidden);
  __syncthreads();
  fully_connected<T>(p.expand_weight, p.expand_bias, hidden, p.reduced, 0, p.channels, Activation::sigmoid,
                     p.gate + int64_t(blockIdx.x) * p.channels);
}

// Grid: images x slices of `rows` hidden units.
template <typename T> __global__ void __launch_bounds__(kThreads, kBlocksPerSM) reduce_kernel(const GateParams p, int rows) {
  EFFNET_DYNAMIC_SHARED(float, squeezed);
  const int first = blockIdx.y * rows;
  squeeze(p, blockIdx.x, squeezed);
  __syncthreads();
  fully_connected<T>(p.reduce_weight, p.reduce_bias, squeezed, p.channels, first, min(first + rows, p.reduced), p.activation,
                     p.hidden + int64_t(blockIdx.x) * p.reduced);
}

// Grid: images x slices of `rows` channels.
template <typename T> __global__ void __launch_bounds__(kThreads, kBlocksPerSM) expand_kernel(const GateParams p, int rows) {
  EFFNET_DYNAMIC_SHARED(float, hidden);
  const int first = blockIdx.y * rows;
  for (int i = threadIdx.x; i < p.reduced; i += kThreads) hidden[i] = p.hidden[int64_t(blockIdx.x) * p.reduced + i];
  __syncthreads();
  fully_connected<T>(p.expand_weight, p.expand_bias, hidden, p.reduced, first, min(first + rows, p.channels), Activation::sigmoid,
                     p.gate + int64_t(blockIdx.x) * p.channels);
}

inline int64_t shared_bytes(const GateParams& p) { return int64_t(p.channels + p.reduced) * sizeof(float); }

// Starts the kernels for p.batch > 0 images on a GPU of that many multiprocessors.
template <typename T> void launch_gate(const GateParams& p, int multiprocessors, void* stream) {
  if (p.batch >= multiprocessors || 2 * int64_t(p.channels) * p.reduced * int64_t(sizeof(T)) <= kWholeBytes) {
    EFFNET_LAUNCH((gate_kernel<T>), dim3(unsigned(p.batch)), dim3(kThreads), shared_bytes(p), stream, p);
    return;
  }
  const int64_t slices = ceil_div(2 * int64_t(multiprocessors), p.batch);  // two blocks for each multiprocessor, if rows allow
  const auto rows_a_block = [&](int rows, int least) {
    return int(ceil_div(rows, slices) > least ? ceil_div(rows, slices) : least);
  };
  const int units = rows_a_block(p.reduced, kWarps), channels = rows_a_block(p.channels, kExpandChannels);
  const dim3 reduce_grid(unsigned(p.batch), unsigned(ceil_div(p.reduced, units)));
  const dim3 expand_grid(unsigned(p.batch), unsigned(ceil_div(p.channels, channels)));
  EFFNET_LAUNCH((reduce_kernel<T>), reduce_grid, dim3(kThreads), p.channels * sizeof(float), stream, p, units);
  EFFNET_LAUNCH((expand_kernel<T>), expand_grid, dim3(kThreads), p.reduced * sizeof(float), stream, p, channels);
}

}  // namespace effnet_fast::squeeze_excite
