// The squeeze-excite gate on CUDA, one launch:  gate = sigmoid(W_e . act(W_r . s + b_r) + b_e),  s = sum_p partial / count, fp32.
//
// A cluster of up to 8 blocks makes the gates of 1, 4 or 8 images, each block for a slice of the channels: it sums its slice of
// the partials, multiplies it with its columns of W_r, reads the other blocks' sums of the hidden units from their shared memory,
// adds all up, and multiplies with its rows of W_e. So a weight is read once for those images, nothing goes through global memory,
// and there is no workspace. Below compute capability 9.0 there are no clusters: one block has all channels.
//
// Several lanes of a warp share 4 rows of an FC; each multiplies its 4 elements of every row with those of every image, which are
// in shared memory, and the totals are added up and dealt out by shuffles. The order of every sum is fixed: no atomics.
//
// An image of C channels, R hidden units and P pieces: 4 P C bytes in, 4 C out, 2 C R multiply-adds; the 2 C R weights come from L2
// once for G images. On an H200 (an SM reads 127 GB/s, all of them 5.5 TB/s) B7's 12 M bf16 weights for 128 images would take
// 554 us one image at a time and take 69 us in eights; one image reads B7's largest gate, 2.5 MB, in 19 us through one SM, in 2.4
// us through 8. What binds then is the chain of trips to memory, and for many images of a large net the instruction slots:
// effnet_fast/benchmark/kernel_time.py has the model. No GPU has timed it yet.
#pragma once
#include "../common/cluster.h"
#include "params.h"

namespace effnet_fast::squeeze_excite {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;                    // of an FC, that a lane works on at once
constexpr int kVector = 4;                  // elements of a row, likewise
constexpr int64_t kSliceBytes = 32 << 10;   // weights of a block from which more blocks share them: 0.25 us of an SM's reading
constexpr int64_t kSharedBytes = 96 << 10;  // least limit of a block on any GPU from 8.0 on
constexpr int kMaxSize = 23000;             // of C + 2 R, so that one image fits a block

// How a launch is cut: blocks of a cluster, channels of a slice (a multiple of 8), the distance of two images' hidden units, floats
// of the squeeze, and lanes that share rows of either FC (8, 16 or 32).
struct Plan {
  int slices, channels, hidden_stride, squeezed_floats, reduce_lanes, expand_lanes;
};

// sum[m * G + g] += rows m . images g, this lane's share: every `lanes`-th vector of V elements, from its own on.
template <int V, int G, typename T> __device__ __forceinline__ void multiply(const T* const (&rows)[kRows], const float* x,
                                                                             int x_stride, int inner, int member, int lanes,
                                                                             float (&sum)[kRows * G]) {
  constexpr int kUnroll = G == 1 ? 4 : G == 4 ? 2 : 1;
#pragma unroll kUnroll
  for (int i = member * V; i < inner; i += lanes * V) {
    Vec<T, V> weight[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) weight[m] = load<V>(rows[m] + i);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const Vec<float, V> in = load<V>(x + g * x_stride + i);
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int k = 0; k < V; ++k) sum[m * G + g] += to_float(weight[m].at[k]) * in.at[k];
    }
  }
}

// Adds up the values of `lanes` neighbouring lanes, and calls put(index, total) for each of the A totals in one of these lanes. At
// each step a lane hands over the half of its values that its partner keeps.
template <int kOffset, int A, typename Put>
__device__ __forceinline__ void add_lanes(const float (&values)[A], int lanes, int first, bool keeps, const Put& put) {
  if (kOffset == 32 || (kOffset >= 8 && kOffset == lanes)) {
#pragma unroll
    for (int i = 0; i < A; ++i)
      if (keeps) put(first + i, values[i]);
    return;
  }
  if constexpr (kOffset < 32) {
    const bool upper = threadIdx.x & kOffset;
    constexpr int kHalf = A > 1 ? A / 2 : 1;
    float half[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = values[i], high = values[A > 1 ? i + kHalf : i];
      half[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kOffset);
    }
    add_lanes<2 * kOffset>(half, lanes, A > 1 && upper ? first + kHalf : first, keeps && (A > 1 || !upper), put);
  }
}

// y[g][row] = weight[row] . x[g] for all rows, by the whole block; x and y in shared memory.
template <int G, typename T> __device__ __forceinline__ void fully_connected(const T* weight, int row_stride, int rows,
                                                                             const float* x, int x_stride, int inner, int lanes,
                                                                             float* y, int y_stride) {
  const bool vectors = inner % kVector == 0 && row_stride % kVector == 0 && aligned16(weight);
  const int lane = threadIdx.x % 32, member = lane & (lanes - 1), rows_a_warp = 32 / lanes * kRows;
  // Trip counts are the same for a whole warp: every lane must come to the shuffles.
  for (int base = int(threadIdx.x) / 32 * rows_a_warp; base < rows; base += kWarps * rows_a_warp) {
    const int row = base + lane / lanes * kRows;
    const T* mine[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) mine[m] = weight + int64_t(min(row + m, rows - 1)) * row_stride;
    float sum[kRows * G] = {};
    if (vectors) {
      multiply<kVector, G>(mine, x, x_stride, inner, member, lanes, sum);
    } else {
      multiply<1, G>(mine, x, x_stride, inner, member, lanes, sum);
    }
    add_lanes<1>(sum, lanes, 0, true, [&](int at, float total) {
      if (row + at / G < rows) y[at % G * y_stride + row + at / G] = total;
    });
  }
}

// squeezed[g][c] = sum_p partial / count for the slice's channels. Where there are fewer vectors than threads, threads share the
// pieces of one: they leave their sums behind each other, [part][g][c], and these are added up in order.
template <int V, int G> __device__ __forceinline__ void squeeze(const GateParams& p, const Plan& plan, int64_t first_image,
                                                                int images, int first, int channels, float* squeezed) {
  const int vectors = plan.channels / V, items = G * vectors, size = G * plan.channels;
  const int parts = min(max(kThreads / items, 1), p.pieces);
  for (int i = threadIdx.x; i < parts * items; i += kThreads) {
    const int part = i / items, g = i % items / vectors, c = i % vectors * V;
    if (c >= channels) continue;
    Vec<float, V> sum{};
    if (g < images) {
      const float* partial = p.partial + (first_image + g) * p.pieces * p.channels + first + c;
#pragma unroll 4
      for (int piece = part; piece < p.pieces; piece += parts) {
        const Vec<float, V> next = load<V>(partial + int64_t(piece) * p.channels);
#pragma unroll
        for (int k = 0; k < V; ++k) sum.at[k] += next.at[k];
      }
    }
    store(squeezed + part * size + g * plan.channels + c, sum);
  }
  __syncthreads();  // the parts are there
  for (int i = threadIdx.x; i < size; i += kThreads) {
    if (i % plan.channels >= channels) continue;
    float sum = squeezed[i];
    for (int part = 1; part < parts; ++part) sum += squeezed[part * size + i];
    squeezed[i] = sum / p.count;
  }
}

// Grid: groups of G images x slices. At least 2 blocks an SM.
template <typename T, int G> __global__ void __launch_bounds__(kThreads, 2) gate_kernel(const GateParams p, const Plan plan) {
  EFFNET_DYNAMIC_SHARED(float, squeezed);               // [G][channels of the slice]; the expand FC's sums after that
  float* const sums = squeezed + plan.squeezed_floats;  // of the hidden units, [G][hidden_stride], over the slice's channels
  float* const hidden = sums + G * plan.hidden_stride;
  const int64_t first_image = int64_t(blockIdx.x / plan.slices) * G;
  const int images = int(min(int64_t(G), p.batch - first_image));
  const int first = int(blockIdx.x % plan.slices) * plan.channels, channels = max(0, min(plan.channels, p.channels - first));

  if (p.channels % kVector == 0 && aligned16(p.partial)) {
    squeeze<kVector, G>(p, plan, first_image, images, first, channels, squeezed);
  } else {
    squeeze<1, G>(p, plan, first_image, images, first, channels, squeezed);
  }
  __syncthreads();  // the squeeze is there
  fully_connected<G>(static_cast<const T*>(p.reduce_weight) + first, p.channels, p.reduced, squeezed, plan.channels, channels,
                     plan.reduce_lanes, sums, plan.hidden_stride);
  cluster_arrive();
  cluster_wait();  // every block's sums are there
  const T* const reduce_bias = static_cast<const T*>(p.reduce_bias);
  for (int i = threadIdx.x * kVector; i < G * plan.hidden_stride; i += kThreads * kVector) {
    Vec<float, kVector> total = load<kVector>(cluster_peer(sums, 0) + i);
#pragma unroll 4
    for (int slice = 1; slice < plan.slices; ++slice) {
      const Vec<float, kVector> next = load<kVector>(cluster_peer(sums, slice) + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k) total.at[k] += next.at[k];
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const int unit = i % plan.hidden_stride + k;
      if (unit < p.reduced) hidden[i + k] = activate(p.activation, total.at[k] + (reduce_bias ? to_float(reduce_bias[unit]) : 0.f));
    }
  }
  cluster_arrive();  // this block needs no other's memory any more
  __syncthreads();   // the hidden units are there
  fully_connected<G>(static_cast<const T*>(p.expand_weight) + int64_t(first) * p.reduced, p.reduced, channels, hidden,
                     plan.hidden_stride, p.reduced, plan.expand_lanes, squeezed, plan.channels);
  __syncthreads();  // the gates' sums are there
  const T* const expand_bias = static_cast<const T*>(p.expand_bias);
  for (int g = 0; g < images; ++g) {
    float* const gate = p.gate + (first_image + g) * p.channels + first;
    for (int c = threadIdx.x; c < channels; c += kThreads) {
      const float sum = squeezed[g * plan.channels + c] + (expand_bias ? to_float(expand_bias[first + c]) : 0.f);
      gate[c] = activate(Activation::sigmoid, sum);
    }
  }
  cluster_wait();  // nor any other this one's
}

// Of 8, 16 and 32 lanes those that get through an FC in fewest steps.
inline int lanes_for(int rows, int inner) {
  int best = 32;
  int64_t least = INT64_MAX;
  for (const int lanes : {32, 16, 8}) {
    const int64_t steps = int64_t(ceil_div(inner, lanes * kVector)) * ceil_div(rows, kThreads / lanes * kRows);
    if (steps < least) best = lanes, least = steps;
  }
  return best;
}

inline int64_t shared_floats(const Plan& plan, int images) {
  return plan.squeezed_floats + int64_t(2) * images * plan.hidden_stride;
}

inline Plan make_plan(const GateParams& p, int slices, int images) {
  Plan plan{};
  plan.slices = slices;
  plan.channels = ceil_div(ceil_div(p.channels, slices), 8) * 8;
  plan.hidden_stride = ceil_div(p.reduced, kVector) * kVector;
  plan.squeezed_floats = max(images * plan.channels, kThreads * kVector);
  plan.reduce_lanes = lanes_for(p.reduced, plan.channels);
  plan.expand_lanes = lanes_for(plan.channels, p.reduced);
  return plan;
}

template <typename T, int G> void launch_group(const GateParams& p, int slices, void* stream) {
  const Plan plan = make_plan(p, slices, G);
  const int64_t blocks = ceil_div(p.batch, int64_t(G)) * slices, bytes = shared_floats(plan, G) * int64_t(sizeof(float));
  if (blocks >= int64_t(1) << 31) throw std::runtime_error("squeeze_excite_gate: there are too many images for one launch");
  // The same limit whatever this call needs: another thread may be between asking for its own and its launch.
  if (bytes > 48 << 10) EFFNET_ALLOW_SHARED((gate_kernel<T, G>), kSharedBytes);
  launch_cluster(gate_kernel<T, G>, unsigned(blocks), kThreads, slices, bytes, stream, p, plan);
}

// Starts the kernel for p.batch > 0 images on a GPU of that many multiprocessors and blocks a cluster (1 where it has none).
template <typename T> void launch_gate(const GateParams& p, int multiprocessors, int largest_cluster, void* stream) {
  if (const int64_t size = int64_t(p.channels) + 2 * int64_t(p.reduced); size > kMaxSize)
    throw std::runtime_error("squeeze_excite_gate: the CUDA kernel takes C + 2 R <= " + std::to_string(kMaxSize) + ", got " +
                             std::to_string(size));
  const int64_t bytes = 2 * int64_t(p.channels) * p.reduced * int64_t(sizeof(T));
  int slices = 1;
  while (slices < largest_cluster && bytes / slices > kSliceBytes) slices *= 2;
  // As few images a group as leave half the multiprocessors idle: with more blocks than that L2 binds, and not each block's
  // reading.
  const auto fits = [&](int images) { return 4 * shared_floats(make_plan(p, slices, images), images) <= kSharedBytes; };
  if (ceil_div(p.batch, int64_t(1)) * slices <= multiprocessors / 2 || !fits(4)) return launch_group<T, 1>(p, slices, stream);
  if (ceil_div(p.batch, int64_t(4)) * slices <= multiprocessors / 2 || !fits(8)) return launch_group<T, 4>(p, slices, stream);
  launch_group<T, 8>(p, slices, stream);
}

}  // namespace effnet_fast::squeeze_excite
