// The backward of training's pointwise convolution on CUDA for half types, channels_last: both gradients, and the sums that the
// norm or the gate before it needs, in one pass.
//
//   g      = of_grad * grad * gate_of_y + of_y * (y - mean) + shift        the gradient of y, rounded as what is stored
//   z      = g W,  grad_W = g^T a,  a = activation(norm(x)) * gate, or x itself
//   grad_x = z where x has no norm, or a gate; else z * activation'(norm(x));  and the residual; sums as params.h has them
//
// A block owns up to 64 of x's channels and a share of the images, whose rows it takes in tiles of 64 or 128: of one image, which
// costs a quarter of them at 14x14, or without gates of all images as one. grad, y and x come by cp.async through a ring of tiles;
// the thread that brings a piece of 8 channels of grad and y also makes g of it, in the place of grad. Then both products are made
// from there by mma of 16 x 8 x 16: z by warps of 16 rows, and grad_W, 16 x 16 of it at a time, in registers that stay from tile to
// tile. z turns in shared memory, so that a thread has 4 channels of a row of it beside those of x, of which it makes a in its
// place, and adds up their sums. W stays in shared memory.
//
// What is added up over tiles leaves in pieces that a second launch adds up, in fixed order (no atomics; the same bits each
// time): sums of an image after 1024 rows, so that chains of floats are 64 long, and grad_W when a block ends.
//
// Bytes a row: 4 K + 4 C, and 4 K more, mostly from L2, for every 64 channels of C above 64. Operations: 2 C K multiply-adds. By
// the SASS of sm_90 a g takes 8 lane-instructions with what brings it, for every 64 of C anew, and with a gate and SiLU an
// element of x 29; the products, and what each tile costs, as much again where K or C is 24. Meant for expansions, C to 64 and K
// to what shared memory holds, of which HBM should bind, and for projections of K to 128, of which instructions should. Not
// run on a GPU yet. What this replaces, a pass that writes g, one that writes a, two products of cuDNN's and a pass for the
// sums, took an H200 253 us for 128 images of 24 to 144 channels of 56x56 and 418 for 144 to 24
// (benchmarks/results/training-trials-cuda.json, products); their bytes are 68 and 63 us, and 90 and 150 are expected here.
#pragma once
#include <limits>

#include "../pointwise/forward.cuh"
#include "activation.cuh"
#include "params.h"

namespace effnet_fast::training {

enum class Before { nothing, norm, norm_and_gate };  // what is read of x

// Where everything lies in shared memory. Rows are an odd number of 16-byte pieces apart: matrices are read without bank conflicts.
struct BackwardLayout {
  int k_row, c_row;       // bytes of a row of g and of x, z or W
  int y, x, gate, stage;  // of a stage, in which grad is first; its bytes
  bool z_in_stage;
  int weight, z, coefficients, norm, bytes;
};

struct PointwiseBackwardLaunch {
  Read read;
  Gradient of_y;
  Range range;
  const void *weight, *residual;
  void* grad_x;          // null where it is not wanted
  float* weight_pieces;  // [pieces, out_channels, in_channels], likewise
  float* sum_pieces;     // [images, parts, 2 or 5, in_channels], likewise
  int images, pixels, in_channels, out_channels;
  int columns;                   // of x's channels, a block's
  int tiles, parts, part_tiles;  // of an image; an image's parts, whose sums are made apart, and their tiles
  int pieces, stages;            // blocks that share columns; of the ring
  BackwardLayout at;
};

constexpr int kBackwardWarps = 8, kMostColumns = 64;

// Of C channels, those of a block: up to 64, about as many for each.
inline int columns_of(int channels) { return ceil_div(channels, 8 * ceil_div(channels, kMostColumns)) * 8; }

// grad_W is made 16 x 16 at a time. A warp stays in 16 columns, of 16, 32 or 64, and shares its rows with the others there.
__host__ __device__ __forceinline__ int across_shift(int columns) { return columns > 32 ? 2 : columns > 16 ? 1 : 0; }
inline int units_of(int out_channels, int columns) {
  return ceil_div(ceil_div(out_channels, 16) << across_shift(columns), kBackwardWarps);
}

template <typename T_, Before kBefore_, int kUnits_> struct PointwiseBackward {
  using T = T_;
  static constexpr Before kBefore = kBefore_;
  static constexpr bool kNormed = kBefore != Before::nothing, kGate = kBefore == Before::norm_and_gate;
  static constexpr int kUnits = kUnits_;  // 16 x 16 of grad_W, of a warp
  static constexpr int kWarps = kBackwardWarps, kThreads = 32 * kWarps;
  // Of a tile: what it costs beside its elements is paid half as often with 128, for which deep layers have no room, nor pixels.
  static constexpr int kRows = kNormed && kUnits == 2 ? 128 : 64;
  static constexpr int kRowWarps = kRows / 16, kHalves = kWarps / kRowWarps, kTiles = kMostColumns / 8 / kHalves;  // of z
  static constexpr int kBlocks = kUnits > 4 ? 1 : 2;  // an SM, without spills
  static constexpr int kMostPartTiles = 1024 / kRows;
  static constexpr int kSums = kGate ? 5 : kNormed ? 2 : 0;

  static BackwardLayout layout(int out_channels, int columns, int stages) {
    BackwardLayout at{};
    at.k_row = (out_channels / 8 | 1) * 16, at.c_row = (columns / 8 | 1) * 16;
    at.y = kRows * at.k_row, at.x = 2 * at.y, at.gate = at.x + kRows * at.c_row;
    at.stage = at.gate + (kGate ? 4 * kMostColumns : 0);
    at.weight = stages * at.stage;
    // z and, after it, the sums of warps: in the place of y, of which g has been made by then, or of their own where that is short.
    const int turned = max(kRows * at.c_row, kWarps * kSums * kMostColumns * 4), after = at.weight + out_channels * at.c_row;
    at.z_in_stage = at.y >= turned;
    at.z = at.z_in_stage ? at.y : after;
    at.coefficients = after + (at.z_in_stage ? 0 : turned);
    at.norm = at.coefficients + 3 * out_channels * 4;
    at.bytes = at.norm + (kNormed ? 3 * kMostColumns * 4 : 0);
    return at;
  }
};

// The tile of an image that a block is at, and where its part of the image ends. A block takes every p.pieces-th part of all
// images.
struct TileOf {
  int image, tile, end;
  template <class P> __device__ __forceinline__ TileOf(const P& p, int task) { start(p, task); }
  template <class P> __device__ __forceinline__ void start(const P& p, int task) {
    image = task / p.parts;
    tile = task % p.parts * p.part_tiles;
    end = min(tile + p.part_tiles, p.tiles);
  }
  template <class P> __device__ __forceinline__ int task(const P& p) const { return image * p.parts + tile / p.part_tiles; }
  template <class P> __device__ __forceinline__ void next(const P& p) {
    if (tile + 1 == end) {
      start(p, task(p) + p.pieces);
    } else {
      ++tile;
    }
  }
};

// 8 floats of shared or global memory.
__device__ __forceinline__ void load_floats(float (&to)[8], const float* from) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vec<float, 4> four = load<4>(from + 4 * half);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[4 * half + e] = four.at[e];
  }
}

// Grid: groups of columns (neighbours run together and share grad and y in L2) x pieces.
template <class Tr> __global__ void __launch_bounds__(Tr::kThreads, Tr::kBlocks)
    pointwise_backward_kernel(const PointwiseBackwardLaunch p) {
  using T = typename Tr::T;
  using Piece = Vec<uint32_t, 4>;  // 8 channels
  using Quad = Vec<uint32_t, 2>;   // 4
  constexpr int kRows = Tr::kRows, kUnits = Tr::kUnits, kSums = Tr::kSums;
  EFFNET_DYNAMIC_SHARED(char, shared);
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // which tells the compiler that it is the same for all lanes
  const int K = p.out_channels, C = p.in_channels, groups = ceil_div(C, p.columns);
  const int first_channel = int(blockIdx.x) % groups * p.columns, number = int(blockIdx.x) / groups;
  const int columns = min(p.columns, C - first_channel);
  const BackwardLayout& at = p.at;
  float* const coefficients = reinterpret_cast<float*>(shared + at.coefficients);  // [3][K]: of_grad, of_y, shift with mean
  float* const norms = reinterpret_cast<float*>(shared + at.norm);                 // [3][kMostColumns]: mean, scale, bias

  // This thread's piece of 8 channels of every k_step-th row of grad and y.
  const int k_pieces = K / 8, k_step = Tr::kThreads / k_pieces, k_piece = thread % k_pieces;
  const int k_first = thread / k_pieces < k_step ? thread / k_pieces : kRows;
  // And of x: it brings 8 channels, and makes something of 4, of twice as many rows: the sums of 8 would take too many registers.
  const int x_shift = columns > 32 ? 3 : 2, x_step = Tr::kThreads >> x_shift, x_piece = thread & (1 << x_shift) - 1;
  const int x_first = x_piece * 8 < columns ? thread >> x_shift : kRows;
  const int my_channel = (thread & (2 << x_shift) - 1) * 4, my_first = my_channel < columns ? thread >> x_shift + 1 : kRows;
  const int my_step = x_step / 2;

  TileOf ahead(p, number);
  auto load_next = [&](int slot) {
    if (ahead.image < p.images) {
      const int first = ahead.tile * kRows, left = min(p.pixels - first, kRows);
      const int rows = left + 15 & ~15;  // those that fill 16 up are zeros
      const int64_t row = int64_t(ahead.image) * p.pixels + first;
      const Shared to = shared_address(shared) + slot * at.stage;
      int64_t from = 2 * ((row + k_first) * K + k_piece * 8);
      Shared here = to + (k_piece * 16 + k_first * at.k_row);
      for (int r = k_first; r < rows; r += k_step, here += k_step * at.k_row, from += 2 * k_step * K) {
        copy_async(here, static_cast<const char*>(p.of_y.grad) + from, r < left ? 16 : 0);
        copy_async(here + at.y, static_cast<const char*>(p.of_y.y) + from, r < left ? 16 : 0);
      }
      from = 2 * ((row + x_first) * C + first_channel + x_piece * 8);
      here = to + (at.x + x_piece * 16 + x_first * at.c_row);
      for (int r = x_first; r < rows; r += x_step, here += x_step * at.c_row, from += 2 * x_step * C)
        copy_async(here, static_cast<const char*>(p.read.x) + from, r < left ? 16 : 0);
      if (Tr::kGate && thread * 4 < columns)
        copy_async(to + (at.gate + thread * 16), p.read.gate + (int64_t(ahead.image) * C + first_channel + thread * 4), 16);
      ahead.next(p);
    }
    copy_async_commit();
  };

  for (int i = thread; i < K * (columns / 8); i += Tr::kThreads) {
    const int k = i / (columns / 8), piece = i % (columns / 8);
    copy_async(shared_address(shared) + (at.weight + k * at.c_row + piece * 16),
               static_cast<const char*>(p.weight) + 2 * (int64_t(k) * C + first_channel + piece * 8), 16);
  }
  for (int slot = 0; slot < p.stages - 1; ++slot) load_next(slot);
  for (int k = thread; k < K; k += Tr::kThreads) {
    const float* const of = p.of_y.coefficients + k;
    coefficients[k] = of[0], coefficients[K + k] = of[K];
    coefficients[2 * K + k] = of[2 * K] - of[K] * p.of_y.norm[k];  // halves have not the digits that a large mean would cost
  }
  if (Tr::kNormed && thread < columns)
#pragma unroll
    for (int i = 0; i < 3; ++i) norms[i * kMostColumns + thread] = p.read.norm[i * C + first_channel + thread];
  __syncthreads();

  float weight_sums[kUnits][2][4] = {};
  float sums[kSums > 0 ? kSums : 1][4] = {};
  const int across = across_shift(columns), my_columns = (warp & (1 << across) - 1) * 16, my_outs = (warp >> across) * 16;
  const Shared ring = shared_address(shared);
  // Below ldmatrix names rows by lane: of g as A of z and, turned, of grad_W; of W and of a, two tiles of columns, as their B. What
  // follows from a lane is worked out where it is wanted (pin): kept, it would cost registers that sums need.
  const int share = ceil_div(columns / 8, Tr::kHalves), first_tile = warp / Tr::kRowWarps * share;
  const int last_tile = min(first_tile + share, columns / 8);

  auto store_quad = [&](int64_t at, const Quad& quad) {  // at once: two stores of 4 bytes would each fill half a sector
    *reinterpret_cast<uint64_t*>(static_cast<uint16_t*>(p.grad_x) + at) = quad.at[0] | uint64_t(quad.at[1]) << 32;
  };
  auto residual_at = [&](int64_t at) {
    return load<2>(reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p.residual) + at));
  };
  auto add = [](Quad& quad, const Quad& more) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      quad.at[i] = round_pair<T>(value_of<T>(quad, 2 * i) + value_of<T>(more, 2 * i),
                                 value_of<T>(quad, 2 * i + 1) + value_of<T>(more, 2 * i + 1));
  };

  int read_slot = 0;
  for (TileOf now(p, number); now.image < p.images; now.next(p)) {
    const int stage = read_slot * at.stage, first = now.tile * kRows, left = min(p.pixels - first, kRows);
    const int64_t row = int64_t(now.image) * p.pixels + first;
    const int free_slot = (read_slot == 0 ? p.stages : read_slot) - 1;
    if (++read_slot == p.stages) read_slot = 0;
    const int z_at = at.z + (at.z_in_stage ? stage : 0);
    pointwise::wait_for_oldest(p.stages);
    // g in the place of grad.
    if (k_first < left) {
      float of_grad[8], of_y[8], shift[8];
      load_floats(of_grad, coefficients + k_piece * 8);
      load_floats(of_y, coefficients + K + k_piece * 8);
      load_floats(shift, coefficients + 2 * K + k_piece * 8);
      if (p.of_y.gate) {
        float gate[8];
        load_floats(gate, p.of_y.gate + (int64_t(now.image) * K + k_piece * 8));
#pragma unroll
        for (int e = 0; e < 8; ++e) of_grad[e] *= gate[e];
      }
      char* here = shared + (stage + k_piece * 16 + k_first * at.k_row);
      for (int r = k_first; r < left; r += k_step, here += k_step * at.k_row) {
        Piece grad = load<4>(reinterpret_cast<const uint32_t*>(here));
        const Piece y = load<4>(reinterpret_cast<const uint32_t*>(here + at.y));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float v[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int e = 2 * i + j;
            v[j] = of_grad[e] * value_of<T>(grad, e) + (of_y[e] * value_of<T>(y, e) + shift[e]);
          }
          grad.at[i] = round_pair<T>(v[0], v[1]);
        }
        store(reinterpret_cast<uint32_t*>(here), grad);
      }
    }
    __syncthreads();  // g and x are there for all, and the slot of the last tile is free
    load_next(free_slot);
    constexpr int kMostRows = kRows / 16;  // of this thread
    [[maybe_unused]] Quad residual[kMostRows] = {};
    if constexpr (!Tr::kNormed) {  // it comes while z is made; beside sums there are no registers for it, and who adds one
      if (p.residual)
#pragma unroll
        for (int i = 0; i < kMostRows; ++i)
          if (const int r = my_first + i * my_step; r < left) residual[i] = residual_at((row + r) * C + first_channel + my_channel);
    }

    const int steps = ceil_div(left, 16);  // of 16 rows
    if (p.grad_x && warp % Tr::kRowWarps < steps) {
      float z[Tr::kTiles][4] = {};
      const int l = pin(lane), rows = warp % Tr::kRowWarps * 16;
      Shared a_row = ring + (stage + (rows + l % 16) * at.k_row + l / 16 * 16);
      const Shared b_rows = ring + (at.weight + first_tile * 16 + l / 16 * 16);
#pragma unroll 2
      for (int k = 0; k < K; k += 16, a_row += 32) {
        uint32_t a[4];
        load_matrices(a, a_row);
        const Shared b_row = b_rows + min(k + l % 16, K - 1) * at.c_row;
        const bool whole = k + 8 < K;  // else what follows these 8 is another row, or y, where z may be written now: it is not used
#pragma unroll
        for (int j = 0; j < Tr::kTiles; j += 2) {
          if (first_tile + j >= last_tile) break;
          uint32_t b[4];
          load_matrices_turned(b, b_row + j * 16);
          if (whole) {
            mma_k16(T(), z[j], a, b[0], b[1]);
            mma_k16(T(), z[j + 1], a, b[2], b[3]);
          } else {
            mma_k8(T(), z[j], a[0], a[1], b[0]);
            mma_k8(T(), z[j + 1], a[0], a[1], b[2]);
          }
        }
      }
      char* const put = shared + (z_at + (rows + l / 4) * at.c_row + l % 4 * 4);
#pragma unroll
      for (int j = 0; j < Tr::kTiles; ++j) {
        if (first_tile + j >= last_tile) break;
        char* const here = put + (first_tile + j) * 16;
        *reinterpret_cast<uint32_t*>(here) = round_pair<T>(z[j][0], z[j][1]);
        *reinterpret_cast<uint32_t*>(here + 8 * at.c_row) = round_pair<T>(z[j][2], z[j][3]);
      }
    }
    if (p.grad_x || Tr::kNormed) __syncthreads();  // z is there for all

    if constexpr (!Tr::kNormed) {
      if (p.grad_x) {
#pragma unroll
        for (int i = 0; i < kMostRows; ++i) {
          const int r = my_first + i * my_step;
          if (r >= left) break;
          Quad z = load<2>(reinterpret_cast<const uint32_t*>(shared + (z_at + r * at.c_row + my_channel * 2)));
          if (p.residual) add(z, residual[i]);
          store_quad((row + r) * C + first_channel + my_channel, z);
        }
      }
    } else {
      // Calls make(z, x) for this thread's channels of each of its rows: grad_x is what that leaves of z.
      auto each_row = [&](const auto& make) {
        char* x = shared + (stage + at.x + my_first * at.c_row + my_channel * 2);
        const char* of_z = shared + (z_at + my_first * at.c_row + my_channel * 2);
        int64_t to = (row + my_first) * C + first_channel + my_channel;
        for (int r = my_first; r < left; r += my_step) {
          Quad z{};
          if (p.grad_x) z = load<2>(reinterpret_cast<const uint32_t*>(of_z));
          make(z, reinterpret_cast<uint32_t*>(x));
          if (p.residual) add(z, residual_at(to));
          if (p.grad_x) store_quad(to, z);
          x += my_step * at.c_row, of_z += my_step * at.c_row, to += my_step * C;
        }
      };
      const float* const norm = norms + my_channel;
      const Vec<float, 4> mean = load<4>(norm), scale = load<4>(norm + kMostColumns), bias = load<4>(norm + 2 * kMostColumns);
      [[maybe_unused]] Vec<float, 4> gate{};
      if constexpr (Tr::kGate) gate = load<4>(reinterpret_cast<const float*>(shared + (stage + at.gate)) + my_channel);
      with_silu<false>(p.range, [&](auto silu) {
        each_row([&](Quad& z, uint32_t* here) {
          const Quad x = load<2>(here);
          float read[4], slopes[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float centred = value_of<T>(x, e) - mean.at[e], of_z = value_of<T>(z, e);
            const ValueAndSlope u = activate_with_slope<silu.value>(p.range, centred * scale.at[e] + bias.at[e]);
            slopes[e] = of_z * u.slope;
            if constexpr (Tr::kGate) {
              read[e] = u.value * gate.at[e];
              sums[0][e] += of_z * u.value;
              sums[1][e] += slopes[e];
              sums[2][e] += u.slope;
              sums[3][e] += slopes[e] * centred;
              sums[4][e] += u.slope * centred;
            } else {
              read[e] = u.value;
              sums[0][e] += slopes[e];
              sums[1][e] += slopes[e] * centred;
            }
          }
          store(here, Quad{round_pair<T>(read[0], read[1]), round_pair<T>(read[2], read[3])});
          if constexpr (!Tr::kGate) z = Quad{round_pair<T>(slopes[0], slopes[1]), round_pair<T>(slopes[2], slopes[3])};
        });
      });
    }
    if (Tr::kNormed) __syncthreads();  // a is there for all

    if (p.weight_pieces && my_columns < columns) {
      const int l = pin(lane);
      Shared a_row = ring + (stage + (l / 16 * 8 + l % 8) * at.k_row + l / 8 % 2 * 16 + my_outs * 2);
      Shared b_row = ring + (stage + at.x + l % 16 * at.c_row + l / 16 * 16 + my_columns * 2);
#pragma unroll 2
      for (int step = 0; step < steps; ++step, a_row += 16 * at.k_row, b_row += 16 * at.c_row) {
        uint32_t b[4];
        load_matrices_turned(b, b_row);
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          const int outs = i * (Tr::kWarps * 16) >> across;  // from this warp's first on
          if (my_outs + outs >= K) break;
          uint32_t a[4];
          load_matrices_turned(a, a_row + outs * 2);
          mma_k16(T(), weight_sums[i][0], a, b[0], b[1]);
          mma_k16(T(), weight_sums[i][1], a, b[2], b[3]);
        }
      }
    }

    if constexpr (kSums > 0) {
      if (p.sum_pieces && now.tile + 1 == now.end) {
        float* const of_warps = reinterpret_cast<float*>(shared + z_at);  // [kWarps][kSums][kMostColumns]
        auto add_lanes = [&](int apart) {
#pragma unroll
          for (int i = 0; i < 4 * kSums; ++i) sums[i / 4][i % 4] += __shfl_xor_sync(0xffffffffu, sums[i / 4][i % 4], apart);
        };
        add_lanes(16);
        if (x_shift == 2) add_lanes(8);
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          if (lane < 2 << x_shift && my_channel < columns)
            store(of_warps + ((warp * kSums + s) * kMostColumns + my_channel),
                  Vec<float, 4>{sums[s][0], sums[s][1], sums[s][2], sums[s][3]});
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[s][e] = 0.f;
        }
        __syncthreads();
        for (int i = thread; i < kSums * columns; i += Tr::kThreads) {
          const int s = i / columns, c = i % columns;
          float sum = 0.f;
          for (int w = 0; w < Tr::kWarps; ++w) sum += of_warps[(w * kSums + s) * kMostColumns + c];
          p.sum_pieces[(int64_t(now.task(p)) * kSums + s) * C + first_channel + c] = sum;
        }
      }
    }
  }

  copy_async_wait<0>();
  if (p.weight_pieces) {
    float* const to = p.weight_pieces + (int64_t(number) * K * C + first_channel);
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int k = my_outs + (i * (Tr::kWarps * 16) >> across) + v % 2 * 8 + lane / 4, c = my_columns + v / 2 * 8 + lane % 4 * 2;
        const float* const two = weight_sums[i][v / 2] + v % 2 * 2;
        if (k < K && c < columns) store(to + (int64_t(k) * C + c), Vec<float, 2>{two[0], two[1]});
      }
  }
}

namespace {  // one .cu file has these

// out [groups, width], the sums over the pieces of partial [groups, pieces, width]. A block has `lanes` of width of a group; as
// many blocks follow one another for each group as that takes.
constexpr int kAddThreads = 256;
__global__ void __launch_bounds__(kAddThreads)
    add_pieces_kernel(const float* partial, int64_t pieces, int64_t width, int lanes, float* out) {
  EFFNET_DYNAMIC_SHARED(double, shared);
  const int blocks = int(ceil_div(width, int64_t(lanes))), lane = int(threadIdx.x) % lanes, row = int(threadIdx.x) / lanes;
  const int64_t group = int(blockIdx.x) / blocks, w = int64_t(int(blockIdx.x) % blocks) * lanes + lane;
  double sum = 0.;
#pragma unroll 8
  for (int64_t piece = row; w < width && piece < pieces; piece += kAddThreads / lanes)
    sum += partial[(group * pieces + piece) * width + w];
  shared[threadIdx.x] = sum;
  for (int half = kAddThreads / 2; half >= lanes; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (row == 0 && w < width) out[group * width + w] = float(shared[threadIdx.x]);
}

// Starts that: of many pieces 32 at once, of few two.
void add_pieces(const float* partial, int64_t groups, int64_t pieces, int64_t width, float* out, void* stream) {
  const int lanes = pieces > 64 ? 8 : 128;
  EFFNET_LAUNCH(add_pieces_kernel, dim3(unsigned(groups * ceil_div(width, int64_t(lanes)))), dim3(kAddThreads),
                kAddThreads * sizeof(double), stream, partial, pieces, width, lanes, out);
}

}  // namespace

// Whether so many blocks with so many stages fit a multiprocessor.
template <class Tr> bool fits(const PointwiseBackwardLaunch& p, const pointwise::Gpu& gpu, int blocks, int stages) {
  return Tr::layout(p.out_channels, p.columns, stages).bytes <= min(gpu.shared_bytes / blocks - 1024, gpu.block_shared_bytes);
}

// How a launch is cut. As many blocks as fit at once share the tasks; parts of images are such that the last round ends soonest.
template <class Tr> PointwiseBackwardLaunch cut_of(PointwiseBackwardLaunch p, const pointwise::Gpu& gpu) {
  if (!fits<Tr>(p, gpu, 1, 2) || units_of(p.out_channels, p.columns) > Tr::kUnits) {
    throw std::runtime_error("pointwise_conv_backward: " + std::to_string(p.in_channels) + " input and " +
                             std::to_string(p.out_channels) + " output channels take more than a block has");
  }
  const int blocks = fits<Tr>(p, gpu, Tr::kBlocks, 2) ? Tr::kBlocks : 1;
  p.stages = 2;
  while (p.stages < pointwise::kMostStages && fits<Tr>(p, gpu, blocks, p.stages + 1)) ++p.stages;
  p.at = Tr::layout(p.out_channels, p.columns, p.stages);
  p.tiles = ceil_div(p.pixels, Tr::kRows);
  const int64_t most = max(gpu.multiprocessors * blocks / ceil_div(p.in_channels, p.columns), 1);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int part_tiles = min(p.tiles, Tr::kMostPartTiles); part_tiles > 0; --part_tiles) {
    const int64_t parts = ceil_div(p.tiles, part_tiles), tasks = p.images * parts;
    const int64_t cost = ceil_div(tasks, most) * (Tr::kSums > 0 ? 4 * part_tiles + 1 : 4 * part_tiles);  // sums cost a quarter tile
    if (cost >= least) continue;
    least = cost;
    p.part_tiles = part_tiles, p.parts = int(parts), p.pieces = int(min(tasks, most));
  }
  return p;
}

template <class Tr> void start_backward(PointwiseBackwardLaunch p, const Gradients& made, const pointwise::Gpu& gpu,
                                        const Allocate& allocate, void* stream) {
  p = cut_of<Tr>(p, gpu);
  const int64_t weights = int64_t(p.out_channels) * p.in_channels, widths = int64_t(Tr::kSums) * p.in_channels;
  const bool one_part = Tr::kGate && p.parts == 1;  // which are the sums, then
  if (made.grad_weight) p.weight_pieces = allocate(p.pieces * weights);
  if (made.sums) p.sum_pieces = one_part ? made.sums : allocate(int64_t(p.images) * p.parts * widths);
  const dim3 grid(unsigned(ceil_div(p.in_channels, p.columns)) * unsigned(p.pieces));
  EFFNET_ALLOW_SHARED(pointwise_backward_kernel<Tr>, p.at.bytes);
  EFFNET_LAUNCH((pointwise_backward_kernel<Tr>), grid, dim3(Tr::kThreads), p.at.bytes, stream, p);
  if (made.grad_weight) add_pieces(p.weight_pieces, 1, p.pieces, weights, made.grad_weight, stream);
  if (!made.sums || one_part) return;
  if (Tr::kGate) return add_pieces(p.sum_pieces, p.images, p.parts, widths, made.sums, stream);
  add_pieces(p.sum_pieces, 1, int64_t(p.images) * p.parts, widths, made.sums, stream);
}

inline PointwiseBackwardLaunch launch_of(const Pointwise& given, const Gradients& made) {
  const std::string op = "pointwise_conv_backward: ";
  if (given.in_channels % 8 || given.out_channels % 8) {
    throw std::runtime_error(op + "the CUDA kernel takes C and K that are multiples of 8, got " +
                             std::to_string(given.in_channels) + " and " + std::to_string(given.out_channels));
  }
  if (made.of_y.activation != Activation::identity || made.of_y.pool)
    throw std::runtime_error(op + "the CUDA kernel takes neither an activation nor a pool of y");
  if (given.pixels > 1 << 30 || given.images * ceil_div(given.pixels, int64_t(64)) > 1 << 30)
    throw std::runtime_error(op + "there are too many pixels for one launch");
  PointwiseBackwardLaunch p{given.read, made.of_y, Range(given.read.activation)};
  p.weight = given.weight;
  p.residual = made.grad_x ? made.residual : nullptr;
  p.grad_x = made.grad_x;
  p.images = int(given.images);
  p.pixels = int(given.pixels);
  if (!given.read.gate && !made.of_y.gate && given.images * given.pixels <= 1 << 30) {  // images end nowhere
    p.images = 1;
    p.pixels = int(given.images * given.pixels);
  }
  p.in_channels = given.in_channels;
  p.out_channels = given.out_channels;
  p.columns = columns_of(p.in_channels);
  return p;
}

// All tensors must be 16-byte aligned, and the weight of T.
template <typename T> void launch_backward(const Pointwise& given, const Gradients& made, const pointwise::Gpu& gpu,
                                           const Allocate& allocate, void* stream) {
  const PointwiseBackwardLaunch p = launch_of(given, made);
  const int units = units_of(p.out_channels, p.columns);
  const auto start = [&](auto tr) { start_backward<decltype(tr)>(p, made, gpu, allocate, stream); };
  const auto normed = [&](auto few, auto many) {
    units <= 2 && fits<decltype(few)>(p, gpu, decltype(few)::kBlocks, 2) ? start(few) : start(many);
  };
  if (p.read.gate) {
    normed(PointwiseBackward<T, Before::norm_and_gate, 2>{}, PointwiseBackward<T, Before::norm_and_gate, 4>{});
  } else if (p.read.norm) {
    normed(PointwiseBackward<T, Before::norm, 2>{}, PointwiseBackward<T, Before::norm, 4>{});
  } else if (units <= 3) {
    start(PointwiseBackward<T, Before::nothing, 3>{});
  } else {
    start(PointwiseBackward<T, Before::nothing, 9>{});
  }
}

}  // namespace effnet_fast::training
