// The squeeze-excite gate on CUDA, one launch:  gate = sigmoid(W_e . act(W_r . s + b_r) + b_e),  s = sum_p partial / count, fp32.
//
// A cluster of up to 8 blocks makes the gates of 1 or 4 images. Each block sums all partials of these images, which are few bytes,
// makes its share of the hidden units from its rows of W_r, writes them into the shared memory of every block of the cluster, and
// makes its share of the gates from its rows of W_e. So a weight is read once for those images, nothing goes through global memory,
// there is no workspace, and between the two layers stands one barrier, after which all that a block reads is its own. Below
// compute capability 9.0 there are no clusters: one block makes everything.
//
// What binds a small batch is the chain of trips to L2, 0.3 us each, and of barriers. So both slices of weights (neighbouring rows,
// hence one run of memory) and the biases set out for shared memory before and while the partials are summed; the loads of the
// partials go out in batches over all threads; and loops are rolled, because a launch finds little of its code in the instruction
// cache. Weights that do not fit, or are not aligned, are read from L2 by the same code. In a fully connected layer several lanes
// of a warp share a row, for 4 images 4 rows, and add up by shuffles. The order of every sum is fixed: no atomics.
//
// An image of C channels, R hidden units and P pieces: 4 P C bytes in, 4 C out, 2 C R multiply-adds; the 2 C R weights come from L2
// once for G images. On an H200 an SM reads 127 GB/s of it and all of them 5.5 TB/s: B0's largest gate, 221 KB in bf16, takes 1.7
// us through one SM and 0.2 us through 8; 256 images of it take 10 us one by one and 2.6 us in fours.
//
// In a CUDA graph on an H200, bf16, B0's gates take 4.6 us on average for one image, 4.6 to 12 for 128 (benchmarks/results/
// kernels-cuda.json) and 5 to 22 for 256. The version before this one split W_r by columns, loaded weights when it came to them and
// was 77 to 82 KB of code (this is 25 to 27 KB for one image, 42 to 44 KB for four): 5.9 to 7.5 us for one image, a third each
// waiting at barriers, for L2 and for instructions, and 6.7 to 24 us for 256. What is left with many images is instructions, 5 a
// multiply-add: tensor cores would take the images of a group together.
#pragma once
#include "../common/cluster.h"
#include "../common/tensor_core.h"
#include "params.h"

namespace effnet_fast::squeeze_excite {

constexpr int kVector = 4;                  // elements of a row that a lane works on at once
constexpr int64_t kSharedBytes = 96 << 10;  // least limit of a block on any GPU from 8.0 on
constexpr int kMaxSize = 23000;             // of C + 2 R, so that one image fits a block

// More threads would sum and multiply in fewer steps, but what surrounds these steps is issued once for each warp, and by the
// counts of effnet_fast/benchmark/kernel_time.py that binds a block of one image.
constexpr int kThreads = 256;
// Of a kernel for G images: rows of an FC that a lane works on at once. One image wants all rows under way, several want every
// value that was fetched used often.
template <int G> constexpr int kRows = G == 1 ? 1 : 4;

// How a launch is cut: blocks of a cluster; the hidden units and the channels (a multiple of 8) that each makes; the distances of
// two images' squeezes and hidden units; floats of the squeeze and of the biases; elements of both slices of weights, 0 where they
// stay in L2; and the logarithms of lanes: that share the channels of a partial sum, and a row of either FC.
struct Plan {
  int slices_shift, units, channels, squeezed_stride, hidden_stride, squeezed_floats, bias_floats, reduce_elements, expand_elements,
      squeeze_shift, reduce_shift, expand_shift;
};

// kVector elements of a row of which `left` are left, zeros after these.
template <bool kVectors, typename T> __device__ __forceinline__ Vec<float, kVector> load_row(const T* row, int left) {
  Vec<float, kVector> values;
  if constexpr (kVectors) {
    const Vec<T, kVector> loaded = load<kVector>(row);
#pragma unroll
    for (int k = 0; k < kVector; ++k) values.at[k] = to_float(loaded.at[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) values.at[k] = k < left ? to_float(row[k]) : 0.f;
  }
  return values;
}

// Starts the copy of `count` elements to shared memory and returns where they will be: there, or still `from` where there is no
// room or they are not whole runs of 16 bytes.
template <typename T> __device__ __forceinline__ const T* stage(const T* from, int count, bool room, T* to) {
  constexpr int kRun = 16 / sizeof(T);
  if (!room || !aligned16(from) || count % kRun) return from;
  const Shared start = shared_address(to);
#pragma unroll 1
  for (int i = threadIdx.x * kRun; i < count; i += kThreads * kRun) copy_async(start + i * int(sizeof(T)), from + i, 16);
  return to;
}

// sum[g] += the partial sums `part`, `part` + `parts` and so on of 4 channels, of which `left` are left.
template <bool kVectors, int G> __device__ __forceinline__ void add_pieces(const GateParams& p, const float* partial, int images,
                                                                           int part, int parts, int left,
                                                                           Vec<float, kVector> (&sum)[G]) {
  // In batches of loads that are under way together: a loop of loads and additions that is merely unrolled waits for each.
  constexpr int kBatch = G == 1 ? 8 : 2;
#pragma unroll 1
  for (int piece = part; piece < p.pieces; piece += kBatch * parts) {
    Vec<float, kVector> next[kBatch][G];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const int64_t row = (G == 1 ? 0 : int64_t(min(g, images - 1)) * p.pieces) + piece + u * parts;
        next[u][g] = {};
        if (piece + u * parts < p.pieces) next[u][g] = load_row<kVectors>(partial + row * p.channels, left);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch * G * kVector; ++i)
      sum[i / kVector % G].at[i % kVector] += next[i / kVector / G][i / kVector % G].at[i % kVector];
  }
}

// squeezed[g][c] = sum_p partial / count. The threads that share the pieces of 4 channels add up within their warp; the warps' sums
// are left behind each other, [part][g][c], and these are added up in order.
template <int G>
__device__ __forceinline__ void squeeze(const GateParams& p, const Plan& plan, int64_t first_image, int images, float* squeezed) {
  const int lanes = 1 << plan.squeeze_shift, member = threadIdx.x & (lanes - 1), size = G * plan.squeezed_stride;
  const int warp_shift = max(plan.squeeze_shift, 5), parts = kThreads >> warp_shift;
  const bool vectors = p.channels % kVector == 0 && aligned16(p.partial);
  // Trip counts are the same for a whole warp, in which fewer than 32 lanes have all channels.
  for (int base = 0; base < plan.squeezed_stride; base += lanes * kVector) {
    const int c = base + member * kVector, left = p.channels - c;
    Vec<float, kVector> sum[G] = {};
    if (left > 0) {
      const float* const partial = p.partial + first_image * p.pieces * p.channels + c;
      const int part = threadIdx.x >> plan.squeeze_shift, of = kThreads >> plan.squeeze_shift;
      if (vectors) {
        add_pieces<true>(p, partial, images, part, of, left, sum);
      } else {
        add_pieces<false>(p, partial, images, part, of, left, sum);
      }
    }
#pragma unroll 1
    for (int offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
      for (int i = 0; i < G * kVector; ++i) {
        float& value = sum[i / kVector].at[i % kVector];
        value += __shfl_xor_sync(0xffffffffu, value, offset);
      }
    }
    if (left > 0 && int(threadIdx.x % 32) < lanes) {
#pragma unroll
      for (int g = 0; g < G; ++g) store(squeezed + (threadIdx.x >> warp_shift) * size + g * plan.squeezed_stride + c, sum[g]);
    }
  }
  __syncthreads();  // the parts are there
#pragma unroll 1
  for (int i = threadIdx.x; i < size; i += kThreads) {
    float sum = squeezed[i];
#pragma unroll 4
    for (int part = 1; part < parts; ++part) sum += squeezed[part * size + i];
    squeezed[i] = sum / p.count;
  }
}

// sum[m * G + g][k % A] += rows m . images g, this lane's share: every `lanes`-th vector, from its own on.
template <bool kVectors, int G, int A, typename T>
__device__ __forceinline__ void multiply(const T* const (&rows)[kRows<G>], const float* x, int x_stride, int inner, int member,
                                         int lanes, float (&sum)[kRows<G> * G][A]) {
  constexpr int kBatch = kVectors && G == 1 ? 4 : 1;
#pragma unroll 1
  for (int i = member * kVector; i < inner; i += kBatch * lanes * kVector) {
    Vec<float, kVector> weight[kBatch][kRows<G>], in[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int at = i + u * lanes * kVector;
#pragma unroll
      for (int m = 0; m < kRows<G>; ++m) {
        weight[u][m] = {};
        if (u == 0 || at < inner) weight[u][m] = load_row<kVectors>(rows[m] + at, inner - at);
      }
      in[u] = load<kVector>(x + (u == 0 || at < inner ? at : i));
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (g > 0) in[u] = load<kVector>(x + g * x_stride + i + u * lanes * kVector);
#pragma unroll
        for (int m = 0; m < kRows<G>; ++m)
#pragma unroll
          for (int k = 0; k < kVector; ++k) sum[m * G + g][k % A] += weight[u][m].at[k] * in[u].at[k];
      }
    }
  }
}

// Of pairs of lanes the upper one gets both sums of the upper half of the values, the lower one of the lower half, until there are
// G left: a lane's row of the M is then (lane & 1) * 2 + (lane >> 1 & 1).
template <int kOffset, int A, int G> __device__ __forceinline__ void share_rows(const float (&values)[A], float (&total)[G]) {
  if constexpr (A == G) {
#pragma unroll
    for (int g = 0; g < G; ++g) total[g] = values[g];
  } else {
    const bool upper = threadIdx.x & kOffset;
    float half[A / 2];
#pragma unroll
    for (int i = 0; i < A / 2; ++i) {
      const float low = values[i], high = values[i + A / 2];
      half[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kOffset);
    }
    share_rows<2 * kOffset>(half, total);
  }
}

// weight[row] . x[g] for all rows, by the whole block; x in shared memory, the weight there or in global memory. Calls put(row,
// totals of the images, member, sharers) in each of the lanes that have this row's.
template <int G, typename T, typename Put> __device__ __forceinline__ void fully_connected(const T* weight, int rows, int inner,
                                                                                           const float* x, int x_stride, int shift,
                                                                                           const Put& put) {
  constexpr int M = kRows<G>, A = G == 1 ? 4 : 2;  // sums of one total: short chains lose fewer bits
  const bool vectors = inner % kVector == 0 && aligned16(weight);
  const int lane = threadIdx.x % 32, lanes = 1 << shift, member = lane & (lanes - 1), rows_a_warp = (32 >> shift) * M;
  // Trip counts are the same for a whole warp: every lane must come to the shuffles.
#pragma unroll 1
  for (int base = int(threadIdx.x) / 32 * rows_a_warp; base < rows; base += kThreads / 32 * rows_a_warp) {
    const int row = base + (lane >> shift) * M;
    const T* mine[M];
#pragma unroll
    for (int m = 0; m < M; ++m) mine[m] = weight + int64_t(min(row + m, rows - 1)) * inner;
    float sum[M * G][A] = {};
    if (vectors) {
      multiply<true, G>(mine, x, x_stride, inner, member, lanes, sum);
    } else {
      multiply<false, G>(mine, x, x_stride, inner, member, lanes, sum);
    }
    float values[M * G], total[G];
#pragma unroll
    for (int i = 0; i < M * G; ++i)
      values[i] = A == 4 ? (sum[i][0] + sum[i][1]) + (sum[i][2] + sum[i][A - 1]) : sum[i][0] + sum[i][1];
    share_rows<1>(values, total);
#pragma unroll 1
    for (int offset = M; offset < lanes; offset *= 2) {
#pragma unroll
      for (int g = 0; g < G; ++g) total[g] += __shfl_xor_sync(0xffffffffu, total[g], offset);
    }
    const int of = row + (M == 1 ? 0 : (lane & 1) * 2 + (lane >> 1 & 1));
    if (of < rows) put(of, total, member / M, lanes / M);
  }
}

// values[i] without an array in memory.
template <int G> __device__ __forceinline__ float pick(const float (&values)[G], int i) {
  float value = values[0];
#pragma unroll
  for (int g = 1; g < G; ++g) value = i == g ? values[g] : value;
  return value;
}

// Grid: groups of G images x slices. At least 2 blocks an SM.
template <typename T, int G> __global__ void __launch_bounds__(kThreads, 2) gate_kernel(const GateParams p, const Plan plan) {
  constexpr int kEarly = 2;                               // biases of a thread that are under way from the start
  EFFNET_DYNAMIC_SHARED(float, squeezed);                 // [G][squeezed_stride]
  float* const hidden = squeezed + plan.squeezed_floats;  // [G][hidden_stride]
  float* const biases = hidden + G * plan.hidden_stride;  // of the block's units, then of its channels
  T* const weights = reinterpret_cast<T*>(biases + plan.bias_floats);
  const bool staged = plan.reduce_elements > 0;
  const int slices = 1 << plan.slices_shift, slice = int(blockIdx.x) & (slices - 1);
  const int64_t first_image = int64_t(blockIdx.x >> plan.slices_shift) * G;
  const int images = int(min(int64_t(G), p.batch - first_image));
  const int first_unit = min(slice * plan.units, p.reduced), units = min(plan.units, p.reduced - first_unit);
  const int first_channel = min(slice * plan.channels, p.channels), channels = min(plan.channels, p.channels - first_channel);
  const auto raw_bias = [&](int row) {
    const bool of_unit = row < units;
    const T* const bias = static_cast<const T*>(of_unit ? p.reduce_bias : p.expand_bias);
    return bias ? bias[of_unit ? first_unit + row : first_channel + row - units] : T{};
  };
  const auto bias_at = [&](int row) { return staged ? biases[row] : to_float(raw_bias(row)); };

  if (slices > 1) cluster_arrive_relaxed();  // this block has started
  // Whatever needs nothing of this image sets out first: its trip to memory is then not a link of the chain.
  T early[kEarly] = {};
#pragma unroll
  for (int k = 0; k < kEarly; ++k)
    if (const int row = int(threadIdx.x) + k * kThreads; staged && row < units + channels) early[k] = raw_bias(row);
  const T* const reduce =
      stage(static_cast<const T*>(p.reduce_weight) + int64_t(first_unit) * p.channels, units * p.channels, staged, weights);
  copy_async_commit();
  if (const int unit = plan.hidden_stride - kVector + threadIdx.x % kVector; threadIdx.x < G * kVector && unit >= p.reduced)
    hidden[threadIdx.x / kVector * plan.hidden_stride + unit] = 0.f;
  squeeze<G>(p, plan, first_image, images, squeezed);
  const T* const expand = stage(static_cast<const T*>(p.expand_weight) + int64_t(first_channel) * p.reduced, channels * p.reduced,
                                staged, weights + plan.reduce_elements);
  copy_async_commit();
#pragma unroll
  for (int k = 0; k < kEarly; ++k)
    if (const int row = int(threadIdx.x) + k * kThreads; staged && row < units + channels) biases[row] = to_float(early[k]);
#pragma unroll 1
  for (int row = int(threadIdx.x) + kEarly * kThreads; staged && row < units + channels; row += kThreads)
    biases[row] = to_float(raw_bias(row));
  copy_async_wait<1>();
  __syncthreads();                 // the squeeze and the reduce layer's weights are there
  if (slices > 1) cluster_wait();  // all blocks have started
  fully_connected<G>(reduce, units, p.channels, squeezed, plan.squeezed_stride, plan.reduce_shift,
                     [&](int row, const float (&total)[G], int member, int sharers) {
                       const float bias = bias_at(row);
#pragma unroll 1
                       for (int g = 0; g < G; ++g) {
                         const float unit = activate(p.activation, pick(total, g) + bias);
                         const int at = g * plan.hidden_stride + first_unit + row;
#pragma unroll 1
                         for (int to = member; to < slices; to += sharers) cluster_peer(hidden, to)[at] = unit;
                       }
                     });
  copy_async_wait<0>();
  if (slices > 1) {
    cluster_arrive();
    cluster_wait();  // every block's hidden units are here, and nobody writes into another block any more
  } else {
    __syncthreads();  // the hidden units are there
  }
  fully_connected<G>(expand, channels, p.reduced, hidden, plan.hidden_stride, plan.expand_shift,
                     [&](int row, const float (&total)[G], int member, int sharers) {
                       float* const gate = p.gate + first_image * p.channels + first_channel + row;
                       const float bias = bias_at(units + row);
#pragma unroll 1
                       for (int g = member; g < min(images, G); g += sharers)
                         gate[int64_t(g) * p.channels] = activate(Activation::sigmoid, pick(total, g) + bias);
                     });
}

// The logarithm of those of 4, 8, 16 and 32 lanes that get through an FC in fewest steps; to add up the lanes' sums is one.
template <int G> int shift_for(int rows, int inner) {
  int best = 5;
  int64_t least = INT64_MAX;
  for (const int shift : {5, 4, 3, 2}) {
    const int64_t steps = int64_t(ceil_div(inner, kVector << shift) + 1) * ceil_div(rows, (kThreads >> shift) * kRows<G>);
    if (steps < least) best = shift, least = steps;
  }
  return best;
}

template <typename T> int64_t shared_bytes(const Plan& plan, int images) {
  const int64_t floats = plan.squeezed_floats + int64_t(images) * plan.hidden_stride + plan.bias_floats;
  return floats * int64_t(sizeof(float)) + (int64_t(plan.reduce_elements) + plan.expand_elements) * int64_t(sizeof(T));
}

template <typename T, int G> Plan make_plan(const GateParams& p, int slices) {
  Plan plan{};
  while (1 << plan.slices_shift < slices) ++plan.slices_shift;
  plan.units = ceil_div(p.reduced, slices);
  plan.channels = ceil_div(ceil_div(p.channels, slices), 8) * 8;
  plan.squeezed_stride = ceil_div(p.channels, kVector) * kVector;
  plan.hidden_stride = ceil_div(p.reduced, kVector) * kVector;
  while (kVector << plan.squeeze_shift < plan.squeezed_stride && 1 << plan.squeeze_shift < kThreads) ++plan.squeeze_shift;
  plan.squeezed_floats = (kThreads >> max(plan.squeeze_shift, 5)) * G * plan.squeezed_stride;
  plan.reduce_shift = shift_for<G>(plan.units, p.channels);
  plan.expand_shift = shift_for<G>(plan.channels, p.reduced);
  Plan staged = plan;
  staged.bias_floats = ceil_div(plan.units + plan.channels, kVector) * kVector;
  staged.reduce_elements = ceil_div(plan.units * p.channels, 8) * 8;
  staged.expand_elements = ceil_div(plan.channels * p.reduced, 8) * 8;
  return shared_bytes<T>(staged, G) <= kSharedBytes ? staged : plan;
}

// Clocks that a launch should take beside what all have in common; -1 where a block's memory does not do. Blocks read 64 bytes of
// weights a clock where all are under way at once, a quarter of that where a few rows are, and all SMs together 21 each. Shared
// memory feeds 20 multiply-adds of one image, 80 where 4 images and 4 rows share what it gives.
template <typename T, int G> int64_t clocks(const GateParams& p, int slices, int multiprocessors) {
  const Plan plan = make_plan<T, G>(p, slices);
  if (shared_bytes<T>(plan, G) > kSharedBytes) return -1;
  const int64_t groups = ceil_div(p.batch, int64_t(G)), turns = ceil_div(groups * slices, int64_t(multiprocessors));
  const int64_t elements = 2 * int64_t(p.channels) * p.reduced, bytes = elements * int64_t(sizeof(T));
  const int64_t block = turns * bytes / slices / (plan.reduce_elements ? 64 : 16), all = groups * bytes / (21 * multiprocessors);
  return max(block, all) + turns * elements * G / slices / (G == 1 ? 20 : 80) + (slices > 1 ? 600 + 50 * slices : 0);
}

template <typename T, int G> void launch_group(const GateParams& p, int slices, void* stream) {
  const Plan plan = make_plan<T, G>(p, slices);
  const int64_t blocks = ceil_div(p.batch, int64_t(G)) * slices, bytes = shared_bytes<T>(plan, G);
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
  int images = 1, slices = 1;
  int64_t least = INT64_MAX;
  for (int cut = 1; cut <= largest_cluster; cut *= 2) {
    const int64_t one = clocks<T, 1>(p, cut, multiprocessors), four = clocks<T, 4>(p, cut, multiprocessors);
    if (one < least) images = 1, slices = cut, least = one;
    if (four >= 0 && four < least) images = 4, slices = cut, least = four;
  }
  if (images == 1) return launch_group<T, 1>(p, slices, stream);
  launch_group<T, 4>(p, slices, stream);
}

}  // namespace effnet_fast::squeeze_excite
