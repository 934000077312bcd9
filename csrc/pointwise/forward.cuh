// Pointwise convolution on CUDA for half types, channels_last:  y = act(norm((x * gate) W^T)) + residual, with C and K multiples of
// 8. All else is Triton's (effnet_fast/ops/pointwise/triton.py), and so are problems too small to give every SM a tile.
//
// A block makes tiles of 64 or 128 pixels x kColumns output channels, one after the other down the image, a warp 16 or 32 pixels of
// each: mma of 16 x 8 x 16. x comes by cp.async in steps of 64 input channels through a ring that runs on from tile to tile, so
// that HBM is at work while a tile is finished. Where it fits, the weight of the block's channels stays in shared memory for all
// its tiles; else it comes through the ring beside x. So do the gates of the tile's images, which are multiplied into the fragments
// of x, two values an instruction. Finished rows turn in shared memory, warp by warp, so that they leave as whole lines.
//
// Bytes an output: 2 + 2 C / K, twice the second term or more where K is wide and tiles of columns read x again, from L2.
// Operations: C multiply-adds, norm and activation. HBM binds for B0 to B7 but in the last stages, where L2 and the tensor cores
// come near it: at 4.3 TB/s over 132 SMs of 1.98 GHz an expanded output (C / K = 1/6) leaves 18 lane-instructions.
//
// An H200 runs B0's shapes in bf16 at 28 to 73 % of their bound (benchmarks/results/kernels-cuda.json), gated projections of large
// images best. What binds expanded layers is instructions: SiLU and the norm took 9.5 an output, all else 4 to 6; bf16's SiLU is
// tanh now, 3.5 with the norm, which took 128 images of 24 to 144 channels of 56x56 from 71 to 63 us. What binds deep layers of few
// pixels is latency. Two steps bought most. Gates through the ring, which were read from memory by a branch each, took 256 images
// of 672 to 112 channels of 14x14 from 162 to 61 us; SiLU of 16 pixels a warp at a time in place of 32 took 256 of 16 to 96
// channels of 112x112 from 286 to 270 us.
#pragma once
#include "../common/epilogue.cuh"
#include "../common/tensor_core.h"
#include "params.h"

namespace effnet_fast::pointwise {

constexpr int kDepth = 64;              // input channels of a step
constexpr int kLineBytes = 2 * kDepth;  // of a row of a step, x's or the weight's
constexpr int kMostStages = 4;
constexpr int64_t kMostRows = (int64_t(1) << 31) - 256;  // their numbers are 32 bits
constexpr int kImages = 4;                               // that a tile's gates may be of
constexpr int kGateRow = 4 * kDepth;                     // bytes of an image's gates of a step

// What the launch decides. resident: the weight stays; else a step brings its part along.
struct KernelParams : Params {
  int rows, pixels, images, tiles, stages;  // those of Params in 32 bits; tiles: of pixels
  bool resident;
};

// kFragments: of 16 pixels, that a warp makes at once. Two share each fragment of the weight; but where that leaves registers for
// less than 16 warps an SM, latency binds. kSilu: there is no other activation, and no residual.
template <typename T_, int kColumns_, int kWarps_, int kFragments_, bool kGate_, bool kSilu_> struct Traits {
  using T = T_;
  using Params = KernelParams;
  static constexpr const char* kOp = "pointwise_conv_bn_act";
  static constexpr int kUnrolled = 16;  // of the rows that a lane moves, all
  struct Seen {};
  static constexpr bool kTrains = false;  // ../training/pointwise_stats.cuh: x is read, and y's rows are seen, by Tr too
  static constexpr int kColumns = kColumns_, kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kFragments = kFragments_, kRows = kWarps * 16 * kFragments;
  static constexpr bool kGate = kGate_, kSilu = kSilu_;
  static constexpr bool kOneStep = kSilu && kWarps == 4 && kColumns == 96;  // it is for 64 input channels at most
  static constexpr int kSums = kColumns / 2 * kFragments;                   // of a thread
  static constexpr int kBlocks = kWarps == 8 ? 2 : kSums <= 24 ? 6 : kFragments == 1 ? 5 : 4;  // an SM, by registers
  static constexpr int kCopied = kThreads / 8;                                                 // rows that all threads copy at once
  static constexpr int kGateAt = kRows * kLineBytes, kStepBytes = kGateAt + (kGate ? kImages * kGateRow : 0);
  static constexpr int kWeightBytes = kColumns * kLineBytes;
  // Of a warp's 16 finished rows: 16-byte pieces of a row, rows that lanes take at once. Rows lie an odd number of pieces apart:
  // matrices are put down and read without bank conflicts.
  static constexpr int kPieces = kColumns / 8, kTaken = 32 / kPieces, kOutRow = (kPieces | 1) * 16, kOutBytes = 16 * kOutRow;
  static constexpr int kFixedBytes = kWarps * kOutBytes;
  static int norm_bytes(const Params&) { return kColumns * int(sizeof(Affine)); }
  static_assert(kColumns % 16 == 0);
};

__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages == 2) return copy_async_wait<0>();
  if (stages == 3) return copy_async_wait<1>();
  copy_async_wait<kMostStages - 2>();
}

// The 16-byte piece `piece` of row `row` of a step: pieces change places so that eight rows' lie in different banks.
__device__ __forceinline__ int place(int row, int piece) { return row * kLineBytes + ((piece ^ (row & 7)) << 4); }

// Part `step` of the block's weight, [channel][64] of T, into shared memory: there after a wait and a barrier.
template <class Tr> __device__ __forceinline__ void load_weight(const KernelParams& p, int first_channel, int step, Shared to) {
  const int row = threadIdx.x / 8, piece = threadIdx.x % 8, c = step * kDepth + piece * 8, rows = p.out_channels - first_channel;
  const char* from = static_cast<const char*>(p.weight) + 2 * (int64_t(first_channel + row) * p.in_channels + c);
  const int bytes = c < p.in_channels ? 16 : 0;
  to = to + place(row, piece);
#pragma unroll
  for (int i = 0; i < Tr::kColumns; i += Tr::kCopied, from += int64_t(2 * Tr::kCopied) * p.in_channels)
    if (Tr::kColumns % Tr::kCopied == 0 || i + row < Tr::kColumns)
      copy_async(to + i * kLineBytes, from, i + row < rows ? bytes : 0);
}

// The same for a weight of another type than x's, from its first row and channel of that part on: there after a barrier. Rare, so
// it is short.
template <class Tr> __device__ __noinline__ void convert_weight(const void* weight, DType dtype, int64_t from, int row_size,
                                                                int rows, int channels, char* to) {
#pragma unroll 1
  for (int i = threadIdx.x; i < Tr::kColumns * kDepth / 2; i += Tr::kThreads) {
    const int row = i / (kDepth / 2), c = i % (kDepth / 2) * 2;
    const int64_t at = from + int64_t(row) * row_size + c;
    const bool real = row < rows && c < channels;
    *reinterpret_cast<uint32_t*>(to + place(row, c / 8) + c % 8 * 2) =
        real ? round_pair<typename Tr::T>(load_float(weight, dtype, at), load_float(weight, dtype, at + 1)) : 0;
  }
}

// Grid: tiles of channels (neighbours run together and share x in L2) x blocks that deal the tiles of pixels out among them.
template <class Tr> __global__ void __launch_bounds__(Tr::kThreads, Tr::kBlocks) tensor_kernel(const typename Tr::Params p) {
  using T = typename Tr::T;
  EFFNET_DYNAMIC_SHARED(char, shared);
  const Shared ring = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, q = lane % 4;  // mma's names: rows (pixels) g and g + 8, columns (channels) 2q and 2q + 1
  const int tiles_across = ceil_div(p.out_channels, Tr::kColumns), blocks = gridDim.x / tiles_across;
  const int first_channel = int(blockIdx.x) % tiles_across * Tr::kColumns, first_tile = blockIdx.x / tiles_across;
  const int columns = min(Tr::kColumns, p.out_channels - first_channel), steps = Tr::kOneStep ? 1 : ceil_div(p.in_channels, kDepth);
  const bool resident = Tr::kOneStep || p.resident, silu = Tr::kSilu || p.activation == Activation::silu;
  const int stage_bytes = Tr::kStepBytes + (resident ? 0 : Tr::kWeightBytes);
  const int weight_at = p.stages * stage_bytes, out_at = weight_at + (resident ? steps * Tr::kWeightBytes : 0);
  const int norm_at = out_at + Tr::kWarps * Tr::kOutBytes;

  auto bring_weight = [&](int step, int at) {
    if (p.weight_dtype == p.dtype) return load_weight<Tr>(p, first_channel, step, ring + at);
    const int c = step * kDepth;
    convert_weight<Tr>(p.weight, p.weight_dtype, int64_t(first_channel) * p.in_channels + c, p.in_channels, columns,
                       p.in_channels - c, shared + at);
  };
  // The ring. A thread always copies the same 16 bytes of channels, of every kCopied-th row.
  const int piece = threadIdx.x % 8, my_row = threadIdx.x / 8;
  const int copied_channels = p.in_channels + 15 & ~15;  // those that fill the last 16 up are zeros; further ones nobody reads
  const int row_bytes = 2 * p.in_channels;
  const Shared to = ring + place(my_row, piece);
  const char* from = static_cast<const char*>(p.x) + int64_t(first_tile * Tr::kRows + my_row) * row_bytes + piece * 16;
  int load_rows = p.rows - first_tile * Tr::kRows;  // from the tile's first on
  int load_step = 0, load_image = 0, write_slot = 0;
  auto load_next = [&] {
    if (load_rows > 0) {
      const int at = write_slot * stage_bytes, c = load_step * kDepth + piece * 8, bytes = c < p.in_channels ? 16 : 0;
      if (c < copied_channels) {
        const char* row = from;
#pragma unroll
        for (int i = 0; i < Tr::kRows; i += Tr::kCopied, row += Tr::kCopied * row_bytes)
          copy_async(to + (at + i * kLineBytes), row, i + my_row < load_rows ? bytes : 0);
      }
      if constexpr (Tr::kGate) {
        if (load_step == 0) load_image = unsigned(p.rows - load_rows) / unsigned(p.pixels);
        if (int(threadIdx.x) < kImages * kGateRow / 16) {
          const int image = min(load_image + int(threadIdx.x) / (kGateRow / 16), p.images - 1);
          const int channel = load_step * kDepth + int(threadIdx.x) % (kGateRow / 16) * 4;
          copy_async(ring + (at + Tr::kGateAt + threadIdx.x * 16), p.gate + (int64_t(image) * p.in_channels + channel),
                     channel < p.in_channels ? 16 : 0);  // gates of no channel are zero, as x is there
        }
      }
      if (!resident) bring_weight(load_step, at + Tr::kStepBytes);
    }
    copy_async_commit();
    from += kLineBytes;
    if (++load_step == steps) {
      load_step = 0;
      load_rows -= blocks * Tr::kRows;
      from += int64_t(blocks * Tr::kRows) * row_bytes - steps * kLineBytes;
    }
    if (++write_slot == p.stages) write_slot = 0;
  };

  if (resident)
    for (int step = 0; step < steps; ++step) bring_weight(step, weight_at + step * Tr::kWeightBytes);
  for (int s = 0; s < p.stages - 1; ++s) load_next();
  if constexpr (Tr::kTrains) Tr::fold(p, reinterpret_cast<Affine*>(shared + norm_at));
  if (!Tr::kTrains && int(threadIdx.x) < Tr::kColumns)
    reinterpret_cast<Affine*>(shared + norm_at)[threadIdx.x] =
        int(threadIdx.x) < columns ? before_silu<T>(fold_norm(p, first_channel + threadIdx.x), silu) : Affine{};

  // ldmatrix takes A as (rows 0..7, k 0..7) (rows 8..15, k 0..7) (rows 0..7, k 8..15) (rows 8..15, k 8..15) and B, whose rows are
  // channels, as (0..7, k 0..7) (0..7, k 8..15) (8..15, k 0..7) (8..15, k 8..15).
  const int a_row = (warp * 16 * Tr::kFragments + lane % 16) * kLineBytes, b_row = (lane / 16 * 8 + lane % 8) * kLineBytes;
  const Shared out = ring + (out_at + warp * Tr::kOutBytes);
  const Shared put = out + (lane % 16 * Tr::kOutRow + lane / 16 * 16);
  char* const mine = shared + (out_at + warp * Tr::kOutBytes + lane / Tr::kPieces * Tr::kOutRow + lane % Tr::kPieces * 16);
  const bool residual = !Tr::kSilu && !Tr::kTrains && p.residual;
  const Affine* const norms = reinterpret_cast<const Affine*>(shared + norm_at);
  // This lane's piece of every kTaken-th finished row, from the first on.
  const int my_taken = lane / Tr::kPieces, my_piece = lane % Tr::kPieces;
  const bool takes = my_taken < Tr::kTaken && my_piece * 8 < columns;
  const int out_bytes = 2 * p.out_channels, to_mine = my_taken * out_bytes + 2 * (first_channel + my_piece * 8);

  [[maybe_unused]] typename Tr::Seen seen;

  int read_slot = 0;
  for (int tile = first_tile; tile < p.tiles; tile += blocks) {
    const int first_row = tile * Tr::kRows + warp * 16 * Tr::kFragments;
    int images = 0;        // of the tile's, those of rows g and g + 8 of each 16: two bits each, which saves registers
    bool one_gate = true;  // for all rows of the warp
    if constexpr (Tr::kGate) {
      const int first_image = min(int(unsigned(tile * Tr::kRows) / unsigned(p.pixels)), p.images - 1);
      const int past = first_row - first_image * p.pixels, last = p.images - 1 - first_image;
      auto image_of = [&](int row) { return min(int(unsigned(past + row) / unsigned(p.pixels)), last); };
      one_gate = image_of(0) == image_of(16 * Tr::kFragments - 1);
#pragma unroll
      for (int i = 0; i < 2 * Tr::kFragments; ++i) images |= image_of(i * 8 + g) << 2 * i;
    }
    float acc[Tr::kFragments][Tr::kColumns / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
      wait_for_oldest(p.stages);
      __syncthreads();  // this step has landed for all; the slot before it is free for all
      load_next();
      const int stage = read_slot * stage_bytes;
      const Shared a_at = ring + (stage + a_row);
      const Shared b_at = ring + ((resident ? weight_at + step * Tr::kWeightBytes : stage + Tr::kStepBytes) + b_row);
      if (++read_slot == p.stages) read_slot = 0;
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        if (k > 0 && step * kDepth + k * 16 >= p.in_channels) break;
        uint32_t a[Tr::kFragments][4];
#pragma unroll
        for (int m = 0; m < Tr::kFragments; ++m)
          load_matrices(a[m], a_at + (m * 16 * kLineBytes + ((k * 2 + lane / 16 ^ lane % 8) << 4)));
        if constexpr (Tr::kTrains) {
          Tr::read(p, a, norms + (step * kDepth + k * 16 + 2 * q), shared + (stage + k * 64 + 8 * q), images);
        } else if constexpr (Tr::kGate) {
          const char* const gates = shared + (stage + Tr::kGateAt + k * 64 + 8 * q);
          auto gate_pair = [&](int row, int half) {
            const Vec<float, 2> v = load<2>(reinterpret_cast<const float*>(gates + (images >> 2 * row & 3) * kGateRow + half * 32));
            return round_pair<T>(v.at[0], v.at[1]);
          };
          const uint32_t shared_by_all[2] = {gate_pair(0, 0), gate_pair(0, 1)};
#pragma unroll
          for (int m = 0; m < Tr::kFragments; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              a[m][i] = multiply_pair<T>(a[m][i], one_gate ? shared_by_all[i / 2] : gate_pair(2 * m + i % 2, i / 2));
        }
#pragma unroll
        for (int j = 0; j < Tr::kColumns / 16; ++j) {
          uint32_t b[4];
          load_matrices(b, b_at + (j * 16 * kLineBytes + ((k * 2 + lane / 8 % 2 ^ lane % 8) << 4)));
#pragma unroll
          for (int m = 0; m < Tr::kFragments; ++m) {
            mma_k16(T(), acc[m][2 * j], a[m], b[0], b[1]);
            mma_k16(T(), acc[m][2 * j + 1], a[m], b[2], b[3]);
          }
        }
      }
    }

#pragma unroll
    for (int m = 0; m < Tr::kFragments; ++m) {
      const int row = first_row + m * 16, left = takes ? p.rows - row : 0;  // may be none
      const int64_t first = int64_t(row) * out_bytes + to_mine;
      // Calls f(place in memory, place in shared memory) for this lane's pieces of the rows.
      auto each_piece = [&](auto* at, const auto& f) {
        at += first;
#pragma unroll(Tr::kUnrolled)
        for (int r = 0; r < 16; r += Tr::kTaken, at += Tr::kTaken * out_bytes)
          if (r + my_taken < min(left, 16)) f(at, mine + r * Tr::kOutRow);
      };
      if (residual) {
        each_piece(static_cast<const char*>(p.residual), [&](const char* at, char* here) {
          store(reinterpret_cast<uint32_t*>(here), load<4>(reinterpret_cast<const uint32_t*>(at)));
        });
        __syncwarp();
      }
#pragma unroll
      for (int j = 0; j < Tr::kColumns / 16; ++j) {
        if (j * 16 >= columns) break;
        uint32_t rest[4], packed[4];  // (rows 0..7, channels 0..7) (rows 8..15, 0..7) (rows 0..7, 8..15) (rows 8..15, 8..15)
        if (residual) load_matrices(rest, put + j * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const sums = acc[m][2 * j + i / 2] + i % 2 * 2;
          float v0 = sums[0], v1 = sums[1];
          if constexpr (!Tr::kTrains) {
            const Vec<Affine, 2> norm = load<2>(norms + j * 16 + i / 2 * 8 + 2 * q);
            v0 = v0 * norm.at[0].scale + norm.at[0].shift, v1 = v1 * norm.at[1].scale + norm.at[1].shift;
            if (silu) {
              silu_of_two<T>(v0, v1);
            } else if (p.activation != Activation::identity) {
              const float most = p.activation == Activation::relu6 ? 6.f : INFINITY;
              v0 = clamp(v0, 0.f, most), v1 = clamp(v1, 0.f, most);
            }
          }
          if (residual) {
            v0 += to_float(T{uint16_t(rest[i])});
            v1 += to_float(T{uint16_t(rest[i] >> 16)});
          }
          packed[i] = round_pair<T>(v0, v1);
        }
        store_matrices(put + j * 32, packed);
      }
      __syncwarp();
      if constexpr (Tr::kTrains) seen.begin([&](const auto& f) { each_piece(static_cast<char*>(p.y), f); });
      each_piece(static_cast<char*>(p.y), [&](char* at, const char* here) {
        const Vec<uint32_t, 4> piece = load<4>(reinterpret_cast<const uint32_t*>(here));
        store(reinterpret_cast<uint32_t*>(at), piece);
        if constexpr (Tr::kTrains) seen.add(piece);
      });
      if constexpr (Tr::kTrains) seen.end();
      __syncwarp();  // the rows have left
    }
  }
  if constexpr (Tr::kTrains) {
    copy_async_wait<0>();
    __syncthreads();  // nothing lands in shared memory any more, and nobody reads it
    Tr::finish(p, seen, shared, my_taken, my_piece, first_channel, columns, first_tile);
  }
}

struct Gpu {
  int multiprocessors;
  int shared_bytes, block_shared_bytes;  // of a multiprocessor; that a block may have
};

#ifdef __CUDACC__
inline Gpu this_gpu() {
  int device = 0;
  Gpu gpu{};
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&gpu.block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return gpu;
}
#endif

// What a launch of the kernel takes. pieces: blocks that share a tile of channels and deal the tiles of pixels out evenly.
template <class Tr> struct Launch {
  typename Tr::Params p;
  int pieces, bytes;
};

template <class Tr> void start(const Launch<Tr>& launch, void* stream) {
  const dim3 grid(unsigned(ceil_div(launch.p.out_channels, Tr::kColumns)) * unsigned(launch.pieces));
  EFFNET_ALLOW_SHARED(tensor_kernel<Tr>, launch.bytes);
  EFFNET_LAUNCH((tensor_kernel<Tr>), grid, dim3(Tr::kThreads), launch.bytes, stream, launch.p);
}

template <class Tr> Launch<Tr> launch_of(typename Tr::Params p, const Gpu& gpu) {
  const int steps = ceil_div(p.in_channels, kDepth), across = ceil_div(p.out_channels, Tr::kColumns);
  if (constexpr int least = ceil_div(Tr::kRows - 1, kImages - 1); Tr::kGate && p.pixels < least) {
    throw std::runtime_error(std::string(Tr::kOp) + ": an image has " + std::to_string(p.pixels) + " pixels; with a gate " +
                             std::to_string(least) + " or more would do for the CUDA kernel");
  }
  p.tiles = ceil_div(p.rows, Tr::kRows);
  // As many blocks an SM as registers and two stages allow. The weight stays where there is room for it beside them.
  p.resident = int64_t(steps) * Tr::kWeightBytes <= 40 << 10;
  const int fixed = Tr::kFixedBytes + Tr::norm_bytes(p) + (p.resident ? steps * Tr::kWeightBytes : 0);
  const int stage = Tr::kStepBytes + (p.resident ? 0 : Tr::kWeightBytes);
  const auto fit = [&](int blocks) { return (min(gpu.shared_bytes / blocks - 1024, gpu.block_shared_bytes) - fixed) / stage; };
  int blocks = Tr::kBlocks;
  while (blocks > 1 && fit(blocks) < 2) --blocks;
  p.stages = min(max(fit(blocks), 2), kMostStages);
  if (fit(1) < 2) {
    throw std::runtime_error(std::string(Tr::kOp) + ": " + std::to_string(p.in_channels) +
                             " input channels take more shared memory than a block may have");
  }
  const int most = min(max(gpu.multiprocessors * blocks / across, 1), p.tiles), rounds = ceil_div(p.tiles, most);
  return {p, ceil_div(p.tiles, rounds), fixed + p.stages * stage};
}

template <class Tr> void launch_tensor(const KernelParams& p, const Gpu& gpu, void* stream) {
  start(launch_of<Tr>(p, gpu), stream);
}

// 96 divides nearly all expanded widths; 128 where that saves a tile, so that x is read less often. Small blocks keep weights of
// few channels more than once an SM, and go on sooner.
template <typename T, bool kGate, bool kSilu> void launch_columns(const KernelParams& p, const Gpu& gpu, void* stream) {
  constexpr int kFragments = kSilu ? 1 : 2;
  const int out = p.out_channels;
  if (out <= 32) return launch_tensor<Traits<T, 32, 4, kFragments, kGate, kSilu>>(p, gpu, stream);
  if (out <= 48) return launch_tensor<Traits<T, 48, 4, kFragments, kGate, kSilu>>(p, gpu, stream);
  if (kSilu ? out % 96 != 0 && out % 128 == 0 : ceil_div(out, 128) < ceil_div(out, 96))
    return launch_tensor<Traits<T, 128, 8, 1, kGate, kSilu>>(p, gpu, stream);
  if constexpr (kSilu)
    if (p.in_channels <= kDepth) return launch_tensor<Traits<T, 96, 4, 1, kGate, kSilu>>(p, gpu, stream);
  launch_tensor<Traits<T, 96, 8, 1, kGate, kSilu>>(p, gpu, stream);
}

inline KernelParams in_32_bits(const char* op, const Params& given) {
  if (given.rows > kMostRows) throw std::runtime_error(std::string(op) + ": there are too many pixels for one launch");
  if (given.in_channels % 8 || given.out_channels % 8) {
    throw std::runtime_error(std::string(op) + ": the CUDA kernel takes C and K that are multiples of 8, got " +
                             std::to_string(given.in_channels) + " and " + std::to_string(given.out_channels));
  }
  KernelParams p{given};
  p.rows = int(given.rows);
  p.pixels = int(given.pixels);
  p.images = p.rows / p.pixels;
  return p;
}

// Starts the kernel for p.rows > 0. x, y, residual, the gate and the weight must be 16-byte aligned.
template <typename T> void launch_forward(const Params& given, const Gpu& gpu, void* stream) {
  const KernelParams p = in_32_bits("pointwise_conv_bn_act", given);
  if (p.gate) return launch_columns<T, true, false>(p, gpu, stream);
  if (p.activation == Activation::silu && !p.residual) return launch_columns<T, false, true>(p, gpu, stream);
  launch_columns<T, false, false>(p, gpu, stream);
}

}  // namespace effnet_fast::pointwise
