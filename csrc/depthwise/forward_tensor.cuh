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

// kExpands: the rows are not read but made, by a 1x1 convolution (../expand_depthwise/forward.cuh).
template <typename T_, int kKernel_, int kStride_, int kStripColumns_, int kGroups_, bool kSilu_, bool kExpands_ = false>
struct TensorTraits {
  using T = T_;
  static constexpr int kKernel = kKernel_, kStride = kStride_, kStripColumns = kStripColumns_, kGroups = kGroups_;
  static constexpr bool kSilu = kSilu_, kExpands = kExpands_;
  static constexpr int kTaps = kKernel * kKernel, kThreads = 64 * kGroups, kChannels = 16 * kGroups;
  // An SM, by registers: 128, 96 or 168 a thread, as a fourth of its 65536 serves 4, 5 or 3 warps.
  static constexpr int kBlocks = kExpands || kKernel == 5 || kGroups == 4 ? 2 : kGroups == 3 ? 3 : 4;
  static constexpr int kStrips = 32 / kStripColumns;
  // Output rows under construction at once; a stage is the input rows after which their roles repeat, so that the unrolled body
  // names every accumulator by a constant.
  static constexpr int kLive = ceil_div(kKernel, kStride), kStageRows = kLive * kStride;
  static constexpr int kInColumns = (kStripColumns - 1) * kStride + kKernel;
  // At stride 2 even columns are stored first, then odd ones: the eight pixels that a fragment takes are then neighbours.
  static constexpr int kEven = kStride == 2 ? (kInColumns + 1) / 2 : kInColumns;
  static constexpr int kPixels = kStrips * kInColumns;
  // [pixel][channel], as in memory: where the 16-byte chunks of a pixel went to places far apart, cp.async asked L2 for each 32
  // bytes by a request of their own, and for many of them twice (measured on an H200). An odd number of chunks a pixel lets
  // ldmatrix take 8 neighbouring pixels from all 32 banks; 5x5 with stride 2 has no room for that, and two of them share banks.
  static constexpr int kChunks = 2 * kGroups,
                       kPixelBytes = 16 * (kKernel == 5 && kStride == 2 && !kExpands ? kChunks : kChunks + 1);
  static constexpr int kRowBytes = kPixels * kPixelBytes, kStageBytes = kStageRows * kRowBytes + (kExpands ? kPixelBytes : 0);
  static constexpr int kStages = kExpands ? 1 : 3 * kStageBytes <= 80 * 1024 ? 3 : 2;
  // The finished rows of a stage on their way out, [row][pixel][16-byte piece]. Two such buffers where every GPU's 99 KB allow it.
  static constexpr int kOutRowBytes = 32 * kChunks * 16, kOutBytes = kLive * kOutRowBytes;
  // A row a tap and one that is read for nothing; 16 bytes more than the channels take spread the taps of a channel over the banks.
  static constexpr int kWeightRow = 2 * kChannels + 16, kWeightBytes = (kTaps + 1) * kWeightRow;
  // Weights and norm have left shared memory before the first row comes out; but where registers are too few, the norm stays and
  // may be read again for each row.
  static constexpr bool kNormStays =
      kBlocks == 3 || (kKernel == 5 && kStride == 1 && (kExpands || (kSilu && std::is_same_v<T, bf16>)));
  static constexpr int kNormOffset = kStages * kStageBytes, kNormBytes = kChannels * int(sizeof(Affine));
  static constexpr int kWeightOffset = kNormOffset + kNormBytes, kOutOffset = kNormStays ? kWeightOffset : kNormOffset;
  static constexpr int kOutBuffers = kOutOffset + 2 * kOutBytes <= (kExpands ? 64 : 99) * 1024 ? 2 : 1;
  static constexpr int kLoopEnd = kOutOffset + kOutBuffers * kOutBytes, kWeightEnd = kWeightOffset + kWeightBytes;
  static constexpr int kSharedBytes = kLoopEnd > kWeightEnd ? kLoopEnd : kWeightEnd;
  static_assert(kSharedBytes <= 99 * 1024);                // what a block of sm_86, 89 and 120 may have
  static_assert(2 * (kSharedBytes + 1024) <= 227 * 1024);  // two blocks an SM from sm_90 on; the GPU itself takes 1 KB of each

  // The swizzle keeps both sides free of bank conflicts: eight neighbouring pixels of one chunk, which fall on the same banks every
  // 8 / kSwapped pixels, and eight chunks in a row.
  static constexpr int kSwapped = kChunks & -kChunks;  // chunks that trade places, a power of two
  static __device__ __forceinline__ int out_place(int pixel, int chunk) {
    return (pixel * kChunks + (chunk ^ (pixel / (8 / kSwapped) % kSwapped))) * 16;
  }
};

// Brings input rows into the ring. A thread always copies the same 16 bytes of channels of the same few columns, so that its
// pointers, its bounds and its places in shared memory are worked out once: kFull columns 32 apart for every row, and one of the
// kRest columns left over, whose rows are dealt out among the threads.
template <class Tr> struct Loader {
  using Params = KernelParams;
  static constexpr const char* kOp = "depthwise_conv_bn_act";  // for messages
  static constexpr int kChunks = Tr::kChunks;
  static constexpr int kFull = Tr::kPixels / 32, kRest = Tr::kPixels % 32;
  static_assert(kRest > 0);
  static constexpr int kRestRows = 32 / kRest, kRestPasses = ceil_div(Tr::kStageRows, kRestRows);
  const char* from[kFull + 1];          // in the first row of the next stage
  int to[kFull + 1], bytes[kFull + 1];  // bytes: 16, or 0 where the column is padding
  int rest_row, first_real, real_rows;  // rows first_real .. + real_rows lie inside the image
  int64_t row_stride;

  __device__ __forceinline__ Loader(const Params& p, int first_image, int first_column, int block_channel, int first_row,
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
      to[i] = place * Tr::kPixelBytes + chunk * 16 + row * Tr::kRowBytes;
    }
  }
  __device__ __forceinline__ bool is_real(int row) const { return unsigned(row - first_real) < unsigned(real_rows); }
  // Rows row0 and on set out: stages come one after another.
  __device__ __forceinline__ void stage(int row0, Shared slot) {
#pragma unroll
    for (int r = 0; r < Tr::kStageRows; ++r)
      if (is_real(row0 + r))
#pragma unroll
        for (int i = 0; i < kFull; ++i) copy_async(slot + (to[i] + r * Tr::kRowBytes), from[i] + r * row_stride, bytes[i]);
    if (rest_row < kRestRows)
#pragma unroll
      for (int pass = 0; pass < kRestPasses; ++pass) {
        const int r = pass * kRestRows;
        if (rest_row + r < Tr::kStageRows && is_real(row0 + rest_row + r))
          copy_async(slot + (to[kFull] + r * Tr::kRowBytes), from[kFull] + r * row_stride, bytes[kFull]);
      }
#pragma unroll
    for (int i = 0; i <= kFull; ++i) from[i] += Tr::kStageRows * row_stride;
    copy_async_commit();
  }
  // Rows past the segment are not real, so stages past it copy nothing.
  __device__ __forceinline__ void begin(char*, Shared ring) {
#pragma unroll
    for (int s = 0; s < Tr::kStages - 1; ++s) stage(s * Tr::kStageRows, ring + s * Tr::kStageBytes);
  }
  // Has the rows from row0 on, which lie at `slot`, ready for all threads.
  __device__ __forceinline__ void next(int row0, char*, Shared ring, int slot) {
    copy_async_wait<Tr::kStages - 2>();
    __syncthreads();  // this stage has landed for all; the slot before it is free for all, and that stage's rows are all there
    stage(row0 + (Tr::kStages - 1) * Tr::kStageRows, ring + ((slot == 0 ? Tr::kStages * Tr::kStageBytes : slot) - Tr::kStageBytes));
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

// Rows: what brings the input rows, a Loader or one that makes them.
template <class Tr, template <class> class Rows = Loader> __global__ void __launch_bounds__(Tr::kThreads, Tr::kBlocks)
    tensor_kernel(const typename Rows<Tr>::Params p) {
  using T = typename Tr::T;
  constexpr int K = Tr::kKernel, S = Tr::kStride;
  // Whether stages without a special row have code of their own. 5x5 on 7x7 has no such stage; with 96 registers, or beside an
  // expansion, only sm_90 has enough for it.
  constexpr bool kWorthwhile = Tr::kSilu && !(K == 5 && S == 1 && Tr::kStripColumns == 8);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  constexpr bool kOverlaps = kWorthwhile && Tr::kBlocks != 3 && !Tr::kExpands;
  constexpr bool kReloads = Tr::kNormStays, kFences = Tr::kBlocks == 3;
#else
  constexpr bool kOverlaps = kWorthwhile, kAlone = Tr::kBlocks != 3 && !Tr::kExpands;
  constexpr bool kReloads = Tr::kNormStays && !kAlone, kFences = Tr::kBlocks == 3 || (Tr::kNormStays && kAlone);
#endif
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

  // What waits longest goes first; but 96 registers do not do for that order.
  if constexpr (Tr::kExpands)
    Rows<Tr>(p, first_image, first_column, block_channel, first_in, first_real, real_rows).begin(shared, ring);
  const Weights<Tr> weights(p, block_channel);
  Affine folded{};
  if (threadIdx.x < Tr::kChannels && block_channel + int(threadIdx.x) < p.channels)
    folded = before_silu<T>(fold_norm(p, block_channel + threadIdx.x), Tr::kSilu);
  Rows<Tr> rows(p, first_image, first_column, block_channel, first_in, first_real, real_rows);
  if constexpr (!Tr::kExpands) rows.begin(shared, ring);
  if constexpr (Tr::kExpands) rows.store_norm(shared);
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
  const int first_pixel = tile_pixel + lane / 8 % 2 * kHalfPixels + lane % 8;
  const Shared my_channels = ring + group * 32;
  const Shared pairs = pin(my_channels + (first_pixel + lane / 16 * (S == 2 ? Tr::kEven : 1)) * Tr::kPixelBytes);
  const Shared singles = pin(my_channels + ((first_pixel + (K - 1) / S) * Tr::kPixelBytes + lane / 16 * 16));

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
  const Affine* const norm_at = reinterpret_cast<const Affine*>(shared + Tr::kNormOffset) + group * 16 + 2 * q;
  auto load_norm = [&] {
#pragma unroll
    for (int j = 0; j < 2; ++j) norm[j] = load<2>(norm_at + 8 * j);
  };
  load_norm();
  // The squeeze too is a product: sum[pixel][channel] += y[pixel][channel] * identity, one instruction for 128 values, and what is
  // added is what was stored. Columns past the image gather in rows of their own and are dropped at the end.
  const uint32_t identity = g / 2 == q ? round_pair<T>(g % 2 ? 0.f : 1.f, g % 2 ? 1.f : 0.f) : 0;
  float sum[2][4] = {};
  float acc[Tr::kLive][2][4];

  // Finished rows turn in shared memory from mma's layout, 16 channels a warp, to one 16-byte chunk a thread of all the block's
  // channels, so that a warp's store touches few lines of 128 bytes: each is a request to L2, and those ran out before DRAM did.
  const Shared rows_out_at = ring + Tr::kOutOffset;
  const Shared put = pin(rows_out_at + Tr::out_place(tile * 16 + lane % 16, group * 2 + lane / 16));
  const int my_pixel = threadIdx.x / Tr::kChunks, my_chunk = threadIdx.x % Tr::kChunks;
  const Shared take = pin(rows_out_at + Tr::out_place(my_pixel, my_chunk));
  const int my_image = first_image + my_pixel / Tr::kStripColumns, my_column = first_column + my_pixel % Tr::kStripColumns;
  const int my_channel = block_channel + my_chunk * 8;
  const bool mine = my_image < int(p.batch) && my_column < p.out_width && my_channel < p.channels;
  const int my_rows = pin(mine ? rows_out * S : 0);
  const int y_stride = p.out_width * p.channels;
  const int64_t y_row =
      int64_t(my_image) * p.out_height + first_out - (K - 1) / S - Tr::kLive;  // as if of a stage before the first
  T* y = static_cast<T*>(p.y) + (y_row * y_stride + int64_t(my_column) * p.channels + my_channel);

  // The r-th of the kLive rows that the stage of input rows row0 and on finishes, times S; not all of them are the segment's.
  auto finished = [&](int row0, int r) { return unsigned(row0 + r * S - (K - 1)); };
  auto copy_out = [&](int row0, int buffer) {
    Vec<uint32_t, 4> row[Tr::kLive];
#pragma unroll
    for (int r = 0; r < Tr::kLive; ++r) row[r] = load_shared_16(take + (buffer + r * Tr::kOutRowBytes));
#pragma unroll
    for (int r = 0; r < Tr::kLive; ++r) {
      if (finished(row0, r) < unsigned(my_rows)) store(reinterpret_cast<uint32_t*>(y), row[r]);
      y += y_stride;
    }
  };
  auto finish = [&](float (&a)[2][4], int place) {
    if constexpr (kReloads) load_norm();
    uint32_t packed[4];  // (half 0, j 0) (half 1, j 0) (half 0, j 1) (half 1, j 1)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int j = m / 2, half = m % 2;
      float v0 = a[j][2 * half] * norm[j].at[0].scale + norm[j].at[0].shift;
      float v1 = a[j][2 * half + 1] * norm[j].at[1].scale + norm[j].at[1].shift;
      if constexpr (Tr::kSilu && std::is_same_v<T, bf16>) {
        silu_of_two<T>(v0, v1);
      } else {  // a reciprocal for each takes fewer instructions
        v0 = activate<Tr::kSilu>(v0, p), v1 = activate<Tr::kSilu>(v1, p);
      }
      packed[m] = round_pair<T>(v0, v1);
    }
    if constexpr (kFences) __syncwarp();  // so that nvcc begins nothing of the next row yet, which takes registers
    store_matrices(put + place, packed);
#pragma unroll
    for (int j = 0; j < 2; ++j) mma_k8(T(), sum[j], packed[2 * j], packed[2 * j + 1], identity);
  };

  // The input rows of one stage. kWhole: all of them lie in the image and all that they finish are the segment's, so that nothing
  // branches, and the products of a row overlap with the activation of the one before.
  auto make_rows = [&](auto whole, int row0, int slot, int buffer) {
    constexpr bool kWhole = decltype(whole)::value;
    constexpr bool kAhead = kWhole || !Tr::kSilu;  // a row is read before the last is finished: as far as registers allow
    uint32_t x[2][K / 2][2][4], last[2][4];
    auto take_row = [&](int i) {
#pragma unroll
      for (int v = 0; v + 1 < K; v += 2)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          load_matrices(x[i % 2][v / 2][j], pairs + (slot + i * Tr::kRowBytes + j * 16 + v / S * Tr::kPixelBytes));
      load_matrices(last[i % 2], singles + (slot + i * Tr::kRowBytes));
    };
    take_row(0);
#pragma unroll
    for (int i = 0; i < Tr::kStageRows; ++i) {
      if (kWhole || rows.is_real(row0 + i)) {  // a padding row adds nothing
#pragma unroll
        for (int u = 0; u < K; ++u) {
          if (!divides(S, i - u)) continue;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float (&a)[4] = acc[slot_of(i, u, S, Tr::kLive)][j];
            if (u == 0) a[0] = a[1] = a[2] = a[3] = 0.f;
#pragma unroll
            for (int v = 0; v + 1 < K; v += 2) mma_k16(T(), a, x[i % 2][v / 2][j], w[u * K + v][j], w[u * K + v + 1][j]);
            mma_k8(T(), a, last[i % 2][2 * j], last[i % 2][2 * j + 1], w[u * K + K - 1][j]);
          }
        }
      } else if (i % S == 0) {
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[i / S % Tr::kLive][e / 4][e % 4] = late_zero();
      }
      if (kAhead && i + 1 < Tr::kStageRows) take_row(i + 1);
      if (divides(S, i - (K - 1)) && (kWhole || finished(row0, i / S) < unsigned(rows_out * S)))
        finish(acc[slot_of(i, K - 1, S, Tr::kLive)], buffer + i / S * Tr::kOutRowBytes);
      if (!kAhead && i + 1 < Tr::kStageRows) take_row(i + 1);
    }
  };
  auto is_whole = [&](int row0) {
    return row0 >= first_real && row0 + Tr::kStageRows <= first_real + real_rows && row0 >= K - 1 &&
           row0 + (Tr::kLive - 1) * S - (K - 1) < rows_out * S;
  };

  int row0 = 0, read_slot = 0, buffer = 0;  // buffer: that the last stage filled
  for (; row0 < rows_in; row0 += Tr::kStageRows) {
    rows.next(row0, shared, ring, read_slot);
    copy_out(row0 - Tr::kStageRows, buffer);
    if constexpr (Tr::kOutBuffers == 1) __syncthreads();  // the buffer is free for all
    if constexpr (Tr::kOutBuffers == 2) buffer = Tr::kOutBytes - buffer;
    if (kOverlaps && warp_ok && is_whole(row0)) {
      make_rows(std::bool_constant<kOverlaps>(), row0, read_slot, buffer);
    } else if (warp_ok) {
      make_rows(std::false_type(), row0, read_slot, buffer);
    }
    read_slot = read_slot + Tr::kStageBytes == Tr::kStages * Tr::kStageBytes ? 0 : read_slot + Tr::kStageBytes;
  }

  __syncthreads();  // the last stage's rows are all there
  copy_out(row0 - Tr::kStageRows, buffer);

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
