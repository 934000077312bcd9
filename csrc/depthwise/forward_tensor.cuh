// The depthwise kernel on the tensor cores: half types, C a multiple of 8. forward.cuh says why.
//
// A block makes 32 columns x 16 * kGroups channels, sliding down a segment of rows; a warp makes 16 columns x 16 channels, with
// the ceil(k / stride) unfinished output rows in accumulators, so that each input row is read from shared memory once.
// kStripColumns: 32 = 32 neighbouring columns of one image; 16 and 8 = the same columns of two or four images side by side, so
// that 14x14 and 7x7 do not waste the tile.
// Grid: x = channel tiles (neighbours in memory run together), y = segments x strips across, z = images / kStrips.
#pragma once
#include "../common/tensor_core.h"
#include "forward_common.cuh"

namespace effnet_fast::depthwise {

constexpr int kPieceColumns = 16;  // of a segment's rows: the columns of one partial sum, a warp's

template <typename T_, int kKernel_, int kStride_, int kStripColumns_, int kGroups_, bool kSilu_> struct TensorTraits {
  using T = T_;
  static constexpr int kKernel = kKernel_, kStride = kStride_, kStripColumns = kStripColumns_, kGroups = kGroups_;
  static constexpr bool kSilu = kSilu_;
  static constexpr int kTaps = kKernel * kKernel, kThreads = 64 * kGroups, kChannels = 16 * kGroups;
  static constexpr int kBlocks = kKernel == 3 && kGroups == 3 ? 3 : 2;  // an SM, by registers; sm_100 would miss the third by one
  static constexpr int kStrips = 32 / kStripColumns;
  // Output rows under construction at once; a stage is the input rows after which their roles repeat, so that the unrolled body
  // names every accumulator by a constant.
  static constexpr int kLive = ceil_div(kKernel, kStride), kStageRows = kLive * kStride;
  static constexpr int kInColumns = (kStripColumns - 1) * kStride + kKernel;
  // At stride 2 even columns are stored first, then odd ones: the eight pixels that a fragment takes are then neighbours.
  static constexpr int kEven = kStride == 2 ? (kInColumns + 1) / 2 : kInColumns;
  static constexpr int kPixels = kStrips * kInColumns;
  // A plane for each 8 channels, [pixel][16 bytes], so that ldmatrix takes 8 neighbouring pixels from all 32 banks. An odd plane
  // spreads the copies of one pixel's chunks over the banks.
  static constexpr int kPlane = kPixels | 1;
  static constexpr int kRowBytes = 2 * kGroups * kPlane * 16, kStageBytes = kStageRows * kRowBytes;
  static constexpr int kStages = 3 * kStageBytes <= 72 * 1024 ? 3 : 2;
  static constexpr int kOutBytes = 512;  // 16 pixels x 16 channels on their way out; two a warp
  // A row a tap and one that is read for nothing; 16 bytes more than the channels take spread the taps of a channel over the banks.
  static constexpr int kWeightRow = 2 * kChannels + 16, kWeightBytes = (kTaps + 1) * kWeightRow;
  static constexpr int kOutOffset = kStages * kStageBytes, kWeightOffset = kOutOffset + kThreads / 32 * 2 * kOutBytes;
  static constexpr int kNormOffset = kWeightOffset + kWeightBytes;
  static constexpr int kSharedBytes = kNormOffset + kChannels * int(sizeof(Affine));
  static_assert(2 * (kSharedBytes + 1024) <= 227 * 1024);  // two blocks an SM from sm_90 on; the GPU itself takes 1 KB of each
};

// Brings input rows into the ring. A thread always copies the same 16 bytes of channels of the same few columns, so that its
// pointers, its bounds and its places in shared memory are worked out once: kFull columns 32 apart for every row, and one of the
// kRest columns left over, whose rows are dealt out among the threads.
template <class Tr> struct Loader {
  static constexpr int kChunks = 2 * Tr::kGroups;  // 16-byte pieces of a pixel
  static constexpr int kFull = Tr::kPixels / 32, kRest = Tr::kPixels % 32;
  static_assert(kRest > 0);
  static constexpr int kRestRows = 32 / kRest, kRestPasses = ceil_div(Tr::kStageRows, kRestRows);
  const char* from[kFull + 1];                        // in the first row of the next stage
  int to[kFull + 1], bytes[kFull + 1];                // bytes: 16, or 0 where the column is padding
  int rest_row, next_row = 0, first_real, real_rows;  // rows first_real .. + real_rows lie inside the image
  int64_t row_stride;

  __device__ __forceinline__ Loader(const KernelParams& p, int first_image, int first_column, int block_channel, int first_row,
                                    int first_real_, int real_rows_)
      : first_real(first_real_), real_rows(real_rows_), row_stride(2 * p.x_row) {
    const int chunk = threadIdx.x % kChunks, lane = threadIdx.x / kChunks;  // lane: 0..31
    rest_row = lane / kRest;
#pragma unroll
    for (int i = 0; i <= kFull; ++i) {
      const int pixel = i < kFull ? i * 32 + lane : kFull * 32 + lane % kRest, row = i < kFull ? 0 : rest_row;
      const int strip = pixel / Tr::kInColumns, column = pixel % Tr::kInColumns;
      const int place = strip * Tr::kInColumns + (Tr::kStride == 2 ? column % 2 * Tr::kEven + column / 2 : column);
      const int n = first_image + strip, w = first_column * Tr::kStride - p.pad_left + column, c = block_channel + chunk * 8;
      const bool real = n < int(p.batch) && w >= 0 && w < p.width && c < p.channels;
      bytes[i] = real ? 16 : 0;
      from[i] = static_cast<const char*>(p.x);
      if (real) from[i] += 2 * (n * p.x_image + (first_row + row) * p.x_row + w * p.x_pixel + c);
      to[i] = (chunk * Tr::kPlane + place) * 16 + row * Tr::kRowBytes;
    }
  }
  __device__ __forceinline__ bool is_real(int row) const { return unsigned(row - first_real) < unsigned(real_rows); }
  __device__ __forceinline__ void stage(Shared slot) {
#pragma unroll
    for (int r = 0; r < Tr::kStageRows; ++r)
      if (is_real(next_row + r))
#pragma unroll
        for (int i = 0; i < kFull; ++i) copy_async(slot + (to[i] + r * Tr::kRowBytes), from[i] + r * row_stride, bytes[i]);
    if (rest_row < kRestRows)
#pragma unroll
      for (int pass = 0; pass < kRestPasses; ++pass) {
        const int r = pass * kRestRows;
        if (rest_row + r < Tr::kStageRows && is_real(next_row + rest_row + r))
          copy_async(slot + (to[kFull] + r * Tr::kRowBytes), from[kFull] + r * row_stride, bytes[kFull]);
      }
    next_row += Tr::kStageRows;
#pragma unroll
    for (int i = 0; i <= kFull; ++i) from[i] += Tr::kStageRows * row_stride;
  }
};

// The block's weights, [channel][tap] of any type in memory, on their way to rows [tap][channel] of T in shared memory. They are
// asked for before the input rows and put down after, so that the two waits are one.
template <class Tr> struct Weights {
  static constexpr int kVectors = Tr::kTaps * Tr::kChannels / 4, kPasses = ceil_div(kVectors, Tr::kThreads);
  float held[kPasses][4] = {};

  template <typename W> __device__ __forceinline__ void load_as(const KernelParams& p, int block_channel) {
    const W* from = static_cast<const W*>(p.weight) + int64_t(block_channel) * Tr::kTaps;
    const int vectors = min(Tr::kChannels, p.channels - block_channel) * Tr::kTaps / 4;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = pass * Tr::kThreads + int(threadIdx.x);
      if (i >= vectors) continue;
      const Vec<W, 4> v = load<4>(from + 4 * i);
#pragma unroll
      for (int k = 0; k < 4; ++k) held[pass][k] = to_float(v.at[k]);
    }
  }
  __device__ __forceinline__ Weights(const KernelParams& p, int block_channel) {
    switch (p.weight_dtype) {
      case DType::fp32: load_as<float>(p, block_channel); break;
      case DType::bf16: load_as<bf16>(p, block_channel); break;
      case DType::fp16: load_as<fp16>(p, block_channel); break;
    }
  }
  __device__ __forceinline__ void store(char* rows) const {
    using T = typename Tr::T;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = pass * Tr::kThreads + int(threadIdx.x);
      if (i >= kVectors) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int channel = (4 * i + k) / Tr::kTaps, tap = (4 * i + k) % Tr::kTaps;
        reinterpret_cast<T*>(rows + tap * Tr::kWeightRow)[channel] = from_float<T>(held[pass][k]);
      }
    }
  }
};

template <class Tr> __global__ void __launch_bounds__(Tr::kThreads, Tr::kBlocks) tensor_kernel(const KernelParams p) {
  using T = typename Tr::T;
  constexpr int K = Tr::kKernel, S = Tr::kStride;
  constexpr int kHalfPixels = Tr::kStripColumns == 8 ? Tr::kInColumns : 8;
  EFFNET_DYNAMIC_SHARED(char, shared);
  const Shared ring = shared_address(shared);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp % Tr::kGroups, tile = warp / Tr::kGroups;
  const int g = lane / 4, q = lane % 4;  // mma's names: rows (pixels) g and g + 8, columns (channels) 2q and 2q + 1
  const int strips_across = ceil_div(p.out_width, Tr::kStripColumns), segment = int(blockIdx.y) / strips_across;
  const int block_channel = blockIdx.x * Tr::kChannels, first_image = blockIdx.z * Tr::kStrips;
  const int first_column = (int(blockIdx.y) - segment * strips_across) * Tr::kStripColumns;
  const int first_out = segment * p.segment, rows_out = min(p.segment, p.out_height - first_out);
  const int first_in = first_out * S - p.pad_top, rows_in = (rows_out - 1) * S + K;
  const int first_real = max(0, -first_in), real_rows = max(0, min(rows_in, p.height - first_in) - first_real);

  const Weights<Tr> weights(p, block_channel);
  Affine folded{};
  if (threadIdx.x < Tr::kChannels && block_channel + int(threadIdx.x) < p.channels)
    folded = fold_norm(p, block_channel + threadIdx.x);
  Loader<Tr> loader(p, first_image, first_column, block_channel, first_in, first_real, real_rows);
#pragma unroll
  for (int s = 0; s < Tr::kStages - 1; ++s) {  // rows past the segment are not real, so stages past it copy nothing
    loader.stage(ring + s * Tr::kStageBytes);
    copy_async_commit();
  }
  weights.store(shared + Tr::kWeightOffset);
  if (threadIdx.x < Tr::kChannels) reinterpret_cast<Affine*>(shared + Tr::kNormOffset)[threadIdx.x] = folded;

  // Half 0 of a fragment is its rows 0..7, half 1 its rows 8..15: neighbours in one strip, or the same columns of two images.
  auto image_of = [&](int half) {
    return first_image + (Tr::kStripColumns == 32 ? 0 : Tr::kStripColumns == 16 ? tile : tile * 2 + half);
  };
  auto column_of = [&](int half, int pixel) {
    return first_column + (Tr::kStripColumns == 32 ? tile * 16 + half * 8 : Tr::kStripColumns == 16 ? half * 8 : 0) + pixel;
  };
  auto exists = [&](int half, int pixel, int channel) {
    return image_of(half) < int(p.batch) && column_of(half, pixel) < p.out_width && channel < p.channels;
  };
  const int warp_channel = block_channel + group * 16;
  const bool warp_ok = warp_channel < p.channels;

  // Where ldmatrix row `lane` lies. Two taps at a time: matrices (half 0, v) (half 1, v) (half 0, v + 1) (half 1, v + 1) of 8
  // channels; the last, odd tap: (half 0, j 0) (half 1, j 0) (half 0, j 1) (half 1, j 1). Either way the registers are mma's A as
  // they come.
  const int tile_pixel = Tr::kStripColumns == 32 ? tile * 16 : tile * Tr::kInColumns * (Tr::kStripColumns == 16 ? 1 : 2);
  const int first_pixel = group * 2 * Tr::kPlane + tile_pixel + lane / 8 % 2 * kHalfPixels + lane % 8;
  const Shared pairs = pin(ring + 16 * (first_pixel + lane / 16 * (S == 2 ? Tr::kEven : 1)));
  const Shared singles = pin(ring + 16 * (first_pixel + lane / 16 * Tr::kPlane + (K - 1) / S));

  // B = diag(w): this lane holds rows k = 2q, 2q + 1 of column g, so a weight only if g is one of the two. ldmatrix with all eight
  // rows of a matrix at one address hands every lane the pair of channels 2q, 2q + 1, of two taps x two j at once; an AND keeps
  // the diagonal.
  __syncthreads();
  uint32_t w[Tr::kTaps + 1][2];
  const uint32_t keep = g == 2 * q ? 0x0000ffffu : g == 2 * q + 1 ? 0xffff0000u : 0u;
  const Shared weight_rows = ring + (Tr::kWeightOffset + lane / 16 * Tr::kWeightRow + (group * 2 + lane / 8 % 2) * 16);
#pragma unroll
  for (int tap = 0; tap < Tr::kTaps; tap += 2) {
    uint32_t r[4];
    load_matrices(r, weight_rows + tap * Tr::kWeightRow);
#pragma unroll
    for (int m = 0; m < 4; ++m) w[tap + m / 2][m % 2] = r[m] & keep;
  }
  Vec<Affine, 2> norm[2];  // [j], of columns 2q and 2q + 1: channel 8j + 2q
#pragma unroll
  for (int j = 0; j < 2; ++j)
    norm[j] = load<2>(reinterpret_cast<const Affine*>(shared + Tr::kNormOffset) + group * 16 + 8 * j + 2 * q);
  // The squeeze too is a product: sum[pixel][channel] += y[pixel][channel] * identity, one instruction for 128 values, and what is
  // added is what was stored. Columns past the image gather in rows of their own and are dropped at the end.
  const uint32_t identity = g / 2 == q ? round_pair<T>(g % 2 ? 0.f : 1.f, g % 2 ? 1.f : 0.f) : 0;
  float sum[2][4] = {};
  float acc[Tr::kLive][2][4];

  // Finished rows turn in shared memory from mma's layout (4 bytes a lane) to 16 bytes a lane, 32 whole bytes of each pixel. The
  // swizzle keeps both sides free of bank conflicts; two buffers need one __syncwarp a row (across stages __syncthreads keeps them
  // apart).
  auto place = [](int pixel, int chunk) { return pixel * 32 + (chunk ^ (pixel / 4 % 2)) * 16; };
  const Shared out = ring + (Tr::kOutOffset + warp * 2 * Tr::kOutBytes);
  const Shared put = pin(out + place(lane / 8 % 2 * 8 + lane % 8, lane / 16)), take = pin(out + place(lane / 2, lane % 2));
  const int my_half = lane / 16, my_pixel = lane / 2 % 8, my_channel = warp_channel + lane % 2 * 8;
  const int mine = pin(exists(my_half, my_pixel, my_channel) ? 1 : 0);
  T* y = static_cast<T*>(p.y);
  if (mine) {
    const int64_t row = int64_t(image_of(my_half)) * p.out_height + first_out;
    y += (row * p.out_width + column_of(my_half, my_pixel)) * p.channels + my_channel;
  }
  const int64_t y_stride = int64_t(p.out_width) * p.channels;

  auto finish = [&](float (&a)[2][4], int buffer) {
    uint32_t packed[4];  // (half 0, j 0) (half 1, j 0) (half 0, j 1) (half 1, j 1)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int j = m / 2, half = m % 2;
      const float v0 = a[j][2 * half] * norm[j].at[0].scale + norm[j].at[0].shift;
      const float v1 = a[j][2 * half + 1] * norm[j].at[1].scale + norm[j].at[1].shift;
      packed[m] = round_pair<T>(activate<Tr::kSilu>(v0, p), activate<Tr::kSilu>(v1, p));
    }
    store_matrices(put + buffer * Tr::kOutBytes, packed);
    __syncwarp();
    const Vec<uint32_t, 4> v = load_shared_16(take + buffer * Tr::kOutBytes);
    if (mine) store(reinterpret_cast<uint32_t*>(y), v);
    y += y_stride;
#pragma unroll
    for (int j = 0; j < 2; ++j) mma_k8(T(), sum[j], packed[2 * j], packed[2 * j + 1], identity);
  };

  int read_slot = 0, write_slot = (Tr::kStages - 1) * Tr::kStageBytes;
  for (int row0 = 0; row0 < rows_in; row0 += Tr::kStageRows) {
    copy_async_wait<Tr::kStages - 2>();
    __syncthreads();  // this stage has landed for all; the slot before it is free for all
    loader.stage(ring + write_slot);
    copy_async_commit();
    if (warp_ok) {
#pragma unroll
      for (int i = 0; i < Tr::kStageRows; ++i) {
        if (loader.is_real(row0 + i)) {  // a padding row adds nothing
          uint32_t x[K / 2][2][4], last[4];
#pragma unroll
          for (int v = 0; v + 1 < K; v += 2)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              load_matrices(x[v / 2][j], pairs + (read_slot + i * Tr::kRowBytes + j * Tr::kPlane * 16 + v / S * 16));
          load_matrices(last, singles + (read_slot + i * Tr::kRowBytes));
#pragma unroll
          for (int u = 0; u < K; ++u) {
            if (!divides(S, i - u)) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float (&a)[4] = acc[slot_of(i, u, S, Tr::kLive)][j];
              if (u == 0) a[0] = a[1] = a[2] = a[3] = 0.f;
#pragma unroll
              for (int v = 0; v + 1 < K; v += 2) mma_k16(T(), a, x[v / 2][j], w[u * K + v][j], w[u * K + v + 1][j]);
              mma_k8(T(), a, last[2 * j], last[2 * j + 1], w[u * K + K - 1][j]);
            }
          }
        } else if (i % S == 0) {
#pragma unroll
          for (int e = 0; e < 8; ++e) acc[i / S % Tr::kLive][e / 4][e % 4] = late_zero();
        }
        if (divides(S, i - (K - 1))) {  // this was the last row of one output row
          const int past = row0 + i - (K - 1);
          if (unsigned(past) < unsigned(rows_out * S)) finish(acc[slot_of(i, K - 1, S, Tr::kLive)], i / S % 2);
        }
      }
    }
    read_slot = read_slot + Tr::kStageBytes == Tr::kStages * Tr::kStageBytes ? 0 : read_slot + Tr::kStageBytes;
    write_slot = write_slot + Tr::kStageBytes == Tr::kStages * Tr::kStageBytes ? 0 : write_slot + Tr::kStageBytes;
  }

  if (!p.partial || !warp_ok) return;
  const int first_piece = segment * ceil_div(p.out_width, kPieceColumns);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int c = warp_channel + 8 * j + 2 * q;
    Vec<float, 2> total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v = exists(half, g, c) ? sum[j][2 * half + e] : 0.f;
        v += __shfl_xor_sync(0xffffffffu, v, 4);
        v += __shfl_xor_sync(0xffffffffu, v, 8);
        v += __shfl_xor_sync(0xffffffffu, v, 16);
        total[half].at[e] = v;
      }
    constexpr int kSums = Tr::kStripColumns == 8 ? 2 : 1;  // halves of one image make one piece
    if constexpr (kSums == 1)
#pragma unroll
      for (int e = 0; e < 2; ++e) total[0].at[e] += total[1].at[e];
#pragma unroll
    for (int half = 0; half < kSums; ++half)
      if (g == 0 && exists(half, 0, c)) {
        const int piece = first_piece + column_of(half, 0) / kPieceColumns;
        store(p.partial + (int64_t(image_of(half)) * p.pieces + piece) * p.channels + c, total[half]);
      }
  }
}

}  // namespace effnet_fast::depthwise
