// The stem on CUDA, half types: a 3x3 convolution with stride 2 from at most 4 channels, norm, activation and residual, y
// channels_last. A matrix product on the tensor cores that needs no im2col.
//
// A block lies on an SM from start to end and makes one tile after another: 4 output rows x up to 112 columns x up to 64 channels.
// It brings the tile's input into shared memory as [row][column][4 channels], columns from the tile's padding on, channels past C
// zero. Two columns are then 16 bytes, stride 2 steps by just those, and the 16 bytes of a pixel and the next are 4 columns x 4
// channels: a row of the product's A with depth 16, as ldmatrix takes it. So a tap row is one m16n8k16 of 16 pixels x 8 channels,
// the weights of the fourth column and channel being zero. That is 3 products, where 27 taps packed would take 2, and saves all of
// the packing.
// A warp makes one output row of the tile, 16 pixels x all channels at a time, and writes them as one run of memory, 16 bytes a
// lane: whole lines where the row starts at one. A thread keeps its share of the weights in registers, and brings two columns of
// every input row by plain loads of single elements: x has any strides, and bytes are normalised on the way. While a block waits
// for its input, the other 3 to 5 of the SM compute.
//
// Bytes an output: 2, and 8 C / K of x; operations: 9 C multiply-adds, norm, activation. HBM binds: at 4.3 TB/s over 132 SMs
// of 1.98 GHz K = 32 leaves 21 lane-instructions an output, 48 and 64 leave 19. From the SASS of sm_90 the products and what
// follows them take, with SiLU (tests/test_resources.py holds them to this):
//                             32 channels   48     64
//   16 pixels, bf16                7.4      6.7    6.2    registers 80, 96, 119: 24, 20 or 16 warps an SM
//              fp16               13.4     12.7   12.2
//   input, channels_last           2.0      1.9    1.0    of B0, B5 and B7; each thread 25 for two columns of a row, NCHW 37
// On an H200, bf16, it runs at 59 to 62 % of the rate that HBM alone allows (B0's, B5's; benchmarks/results/kernels-cuda.json): 104
// us for B0 at batch 256, where a gather of single elements in Triton took 301. Its warps wait for the input most. (With SiLU by an
// exponential and a shared reciprocal, as fp16 still has it; bf16's tanh has not been timed.)
//
// Traps: 0 * inf is NaN, so an input that is not finite spoils, beside the outputs that see it, the one to the left of them; and
// tensor cores truncate fp32 sums, far below the precision of half storage.
#pragma once
#include "../common/epilogue.cuh"
#include "../common/tensor_core.h"
#include "params.h"

namespace effnet_fast::conv {

struct KernelParams : Params {
  int columns;      // of a tile, a multiple of 16
  int strips;       // of so many columns, that an output row is
  int tiles;        // of the batch
  float low, high;  // the range of an activation other than SiLU
};

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = kWarps, kInRows = 2 * kRows + 1;         // of a tile
constexpr int kMaxColumns = 112, kRowPairs = kMaxColumns + 1;  // of a tile, and what a row of its input takes
constexpr int kInBytes = kInRows * kRowPairs * 16;
static_assert(kRowPairs <= kThreads);
constexpr int kDepth = 48;  // of the product: 3 tap rows of 4 columns x 4 channels

template <typename T_, int kPairs_, bool kSilu_> struct StemTraits {
  using T = T_;
  static constexpr int kPairs = kPairs_, kChannels = 16 * kPairs;  // of a block; mma takes 8, ldmatrix and stmatrix 16
  static constexpr bool kSilu = kSilu_;
  static constexpr int kBlocks = kPairs == 2 ? 6 : kPairs == 3 ? 5 : 4;  // an SM, by registers
  // Of a warp: 16 pixels on their way out, and 16 bytes for channels that do not exist.
  static constexpr int kOutBytes = 16 * 2 * kChannels + 16;
  static constexpr int kNormOffset = kInBytes + kWarps * kOutBytes;
  static constexpr int kSharedBytes = kNormOffset + kChannels * int(sizeof(Affine));
  // Weights lie where pixels go out later. 48 KB need no asking for.
  static_assert(kChannels * kDepth * 2 <= kWarps * kOutBytes && kSharedBytes <= 48 << 10);
};

// How an input lies in memory: 3 channels next to each other and pixels likewise (channels_last), 3 planes with pixels next to each
// other (NCHW), or anyhow.
enum class Layout { packed, planes, any };

// Brings a tile's input into shared memory: from row first_row and column first_column on, which may lie outside the image. A
// thread brings the same two columns of every row, so that its bounds and its pointer are worked out once.
template <typename T, typename Source, Layout kLayout>
__device__ __forceinline__ void load_input(const KernelParams& p, char* input, int64_t image, int first_row, int first_column) {
  constexpr bool kBytes = std::is_same_v<Source, uint8_t>;
  constexpr int kChannels = kLayout == Layout::any ? 4 : 3;
  if (int(threadIdx.x) > p.columns) return;
  const int column = first_column + 2 * int(threadIdx.x);
  const bool inside[2] = {unsigned(column) < unsigned(p.width), unsigned(column + 1) < unsigned(p.width)};
  const int64_t pixel = kLayout == Layout::packed ? 3 : kLayout == Layout::planes ? 1 : p.x_pixel;
  const int64_t channel = kLayout == Layout::packed ? 1 : p.x_channel;
  const Source* from = static_cast<const Source*>(p.x) + (image * p.x_image + first_row * p.x_row + column * pixel);
  float scale[4] = {}, shift[4] = {};
  if constexpr (kBytes)
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (kChannels == 3 || c < p.in_channels) {
        scale[c] = p.pixels[c];
        shift[c] = p.pixels[p.in_channels + c];
      }

  constexpr int kBatch = kLayout == Layout::any ? 1 : 3;  // rows whose loads are under way at once
  static_assert(kInRows % kBatch == 0);
#pragma unroll 1
  for (int row = 0; row < kInRows; row += kBatch) {
    Source held[kBatch][2][4] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool row_inside = unsigned(first_row + row + b) < unsigned(p.height);
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          if (row_inside && inside[k] && (kChannels == 3 || c < p.in_channels)) held[b][k][c] = from[k * pixel + c * channel];
      from += p.x_row;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool row_inside = unsigned(first_row + row + b) < unsigned(p.height);
      Vec<uint32_t, 4> v;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Source(&x)[4] = held[b][k];
        if constexpr (kBytes) {
          float value[4] = {};
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            if (row_inside && inside[k]) value[c] = to_float(x[c]) * scale[c] + shift[c];
          v.at[2 * k] = round_pair<T>(value[0], value[1]);
          v.at[2 * k + 1] = round_pair<T>(value[2], value[3]);
        } else {
          v.at[2 * k] = x[0].bits | uint32_t(x[1].bits) << 16;
          v.at[2 * k + 1] = x[2].bits | uint32_t(x[3].bits) << 16;
        }
      }
      store(reinterpret_cast<uint32_t*>(input + ((row + b) * kRowPairs + int(threadIdx.x)) * 16), v);
    }
  }
}

template <typename T, typename Source>
__device__ __forceinline__ void load_input(const KernelParams& p, char* input, int64_t image, int first_row, int first_column) {
  if (p.in_channels == 3 && p.x_channel == 1 && p.x_pixel == 3) {
    load_input<T, Source, Layout::packed>(p, input, image, first_row, first_column);
  } else if (p.in_channels == 3 && p.x_pixel == 1) {
    load_input<T, Source, Layout::planes>(p, input, image, first_row, first_column);
  } else {
    load_input<T, Source, Layout::any>(p, input, image, first_row, first_column);
  }
}

// Puts the block's weights, [channel][C][3][3] of type W in memory, down as [channel][tap row][column][channel of x] of T.
template <class Tr, typename W>
__device__ __forceinline__ void put_weights(const KernelParams& p, typename Tr::T* rows, int first_channel) {
  constexpr int kEach = Tr::kChannels * kDepth / kThreads;
  const W* const weight = static_cast<const W*>(p.weight) + int64_t(first_channel) * p.in_channels * 9;
  float held[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int to = i * kThreads + int(threadIdx.x), k = to / kDepth, tap = to % kDepth;
    const int dy = tap / 16, dx = tap / 4 % 4, c = tap % 4;
    const bool exists = first_channel + k < p.channels && dx < 3 && c < p.in_channels;
    held[i] = exists ? to_float(weight[(k * p.in_channels + c) * 9 + dy * 3 + dx]) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) rows[i * kThreads + int(threadIdx.x)] = from_float<typename Tr::T>(held[i]);
}

// y + residual, 8 values of each.
template <typename T>
__device__ __forceinline__ Vec<uint32_t, 4> add_residual(const Vec<uint32_t, 4>& y, const Vec<uint32_t, 4>& residual) {
  const auto half = [](uint32_t pair, int which) { return to_float(T{static_cast<uint16_t>(pair >> 16 * which)}); };
  Vec<uint32_t, 4> sum;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sum.at[i] = round_pair<T>(half(y.at[i], 0) + half(residual.at[i], 0), half(y.at[i], 1) + half(residual.at[i], 1));
  return sum;
}

// Puts out the chunks of 16 pixels where each has channels of other blocks beside its own, or a residual to add; `first` is the
// first one's element.
template <class Tr>
__device__ __forceinline__ void put_chunks(const KernelParams& p, int64_t first, const Shared (&take)[2], int chunks, int parts) {
#pragma unroll 1
  for (int c = int(threadIdx.x) % 32, i = 0; c < chunks; c += 32, ++i) {
    Vec<uint32_t, 4> v = load_shared_16((i % 2 ? take[1] : take[0]) + i / 2 * 1024);
    const int64_t at = first + c / parts * p.channels + c % parts * 8;
    if (p.residual) v = add_residual<typename Tr::T>(v, load<4>(static_cast<const uint32_t*>(p.residual) + at / 2));
    store(static_cast<uint32_t*>(p.y) + at / 2, v);
  }
}

template <class Tr> __global__ void __launch_bounds__(kThreads, Tr::kBlocks) stem_kernel(const KernelParams p) {
  using T = typename Tr::T;
  constexpr int kPairs = Tr::kPairs;
  EFFNET_DYNAMIC_SHARED(char, shared);
  const Shared input = shared_address(shared);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, q = lane % 4;  // mma's names: rows (pixels) g and g + 8, columns (channels) 2q and 2q + 1
  const int first_channel = blockIdx.y * Tr::kChannels, parts = min(Tr::kChannels, p.channels - first_channel) / 8;

  T* const weights = reinterpret_cast<T*>(shared + kInBytes);
  Affine* const folded = reinterpret_cast<Affine*>(shared + Tr::kNormOffset);
  switch (p.weight_dtype) {
    case DType::fp32: put_weights<Tr, float>(p, weights, first_channel); break;
    case DType::bf16: put_weights<Tr, bf16>(p, weights, first_channel); break;
    case DType::fp16: put_weights<Tr, fp16>(p, weights, first_channel); break;
  }
  if (int(threadIdx.x) < Tr::kChannels)
    folded[threadIdx.x] =
        int(threadIdx.x) < parts * 8 ? before_silu<T>(fold_norm(p, first_channel + threadIdx.x), Tr::kSilu) : Affine{};
  __syncthreads();
  uint32_t w[kPairs][2][3][2];  // B: depth 2q and 2q + 1, then 8 more, of column g
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
#pragma unroll
    for (int i = 0; i < 6; ++i)
      w[j / 2][j % 2][i / 2][i % 2] =
          load<1>(reinterpret_cast<const uint32_t*>(weights + (8 * j + g) * kDepth + 8 * i + 2 * q)).at[0];
  }

  // Row `lane` of A: matrices (pixels 0 to 7, depth 0 to 7) (pixels 8 to 15) (pixels 0 to 7, depth 8 to 15) (pixels 8 to 15). The
  // pixels of a warp start at its output row.
  const Shared a_rows = pin(input + (2 * warp * kRowPairs + lane % 16 + lane / 16) * 16);
  // 16 pixels on their way out are chunks of 8 channels in memory's order; the swizzle spreads a chunk of 8 pixels over the banks.
  const auto chunk = [](int i) { return (i ^ (i / 8 % 8)) * 16; };
  const Shared out = input + (kInBytes + warp * Tr::kOutBytes);
  Shared put[kPairs], take[2];
#pragma unroll
  for (int m = 0; m < kPairs; ++m) {
    const int part = 2 * m + lane / 16;
    put[m] = pin(out + (part < parts ? chunk(lane % 16 * parts + part) : Tr::kOutBytes - 16));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) take[i] = pin(out + chunk(i * 32 + lane));

  const bool simple = gridDim.y == 1 && !p.residual;  // a run of memory, to be written alone
  const int strips_down = ceil_div(p.out_height, kRows), image_tiles = strips_down * p.strips;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int image = tile / image_tiles, in_image = tile % image_tiles;
    const int first_row = in_image / p.strips * kRows, first_column = in_image % p.strips * p.columns;
    __syncthreads();  // all have read the tile before, or the weights
    const int in_row = first_row * 2 - p.pad_top, in_column = first_column * 2 - p.pad_left;
    if (p.pixels) {
      load_input<T, uint8_t>(p, shared, image, in_row, in_column);
    } else {
      load_input<T, T>(p, shared, image, in_row, in_column);
    }
    __syncthreads();  // the tile has landed

    const int row = first_row + warp;
    if (row >= p.out_height) continue;
    const int columns = min(p.columns, p.out_width - first_column);
    const int64_t pixel = (int64_t(image) * p.out_height + row) * p.out_width + first_column;
    int64_t at = pixel * p.channels + first_channel;
    Shared a_row = a_rows;
    for (int column = 0; column < columns; column += 16) {
      uint32_t a[3][4];
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) load_matrices(a[dy], a_row + dy * kRowPairs * 16);
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
        uint32_t packed[4];  // (pixels 0 to 7, j 0) (pixels 8 to 15, j 0) (pixels 0 to 7, j 1) (pixels 8 to 15, j 1)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Vec<Affine, 2> norm = load<2>(folded + 16 * m + 8 * j + 2 * q);
          float sum[4] = {};
#pragma unroll
          for (int dy = 0; dy < 3; ++dy) mma_k16(T(), sum, a[dy], w[m][j][dy][0], w[m][j][dy][1]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float v0 = sum[2 * half] * norm.at[0].scale + norm.at[0].shift;
            float v1 = sum[2 * half + 1] * norm.at[1].scale + norm.at[1].shift;
            if constexpr (Tr::kSilu) {
              silu_of_two<T>(v0, v1);
            } else {
              v0 = clamp(v0, p.low, p.high);
              v1 = clamp(v1, p.low, p.high);
            }
            packed[2 * j + half] = round_pair<T>(v0, v1);
          }
        }
        store_matrices(put[m], packed);
      }
      __syncwarp();  // the pixels are there
      const int chunks = min(16, columns - column) * parts;
      if (simple) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const Vec<uint32_t, 4> v = load_shared_16(take[i % 2] + i / 2 * 1024);
          if (i * 32 + lane < chunks) store(static_cast<uint32_t*>(p.y) + (at / 2 + lane * 4 + i * 128), v);
        }
      } else {
        put_chunks<Tr>(p, at, take, chunks, parts);
      }
      __syncwarp();  // and have been taken
      a_row += 256;
      at += 16 * int64_t(p.channels);
    }
  }
}

constexpr int kMaxTiles = 1 << 30;  // of one launch

template <class Tr> void launch_stem(KernelParams p, int multiprocessors, void* stream) {
  const int across = ceil_div(p.out_width, 16);
  p.strips = ceil_div(across, kMaxColumns / 16);
  p.columns = ceil_div(across, p.strips) * 16;
  const int64_t image_tiles = int64_t(ceil_div(p.out_height, kRows)) * p.strips;
  if (image_tiles > kMaxTiles) throw std::runtime_error("conv_bn_act: the image is too large for one launch");
  const int64_t batch = p.batch, y_image = int64_t(p.out_height) * p.out_width * p.channels;
  const int64_t x_bytes = p.x_image * (p.pixels ? 1 : 2), y_bytes = y_image * 2;
  const int groups = ceil_div(p.channels, Tr::kChannels);
  for (int64_t done = 0; done < batch; done += p.batch) {
    p.batch = min(batch - done, kMaxTiles / image_tiles);
    p.tiles = int(p.batch * image_tiles);
    const dim3 grid(unsigned(min(p.tiles, max(1, multiprocessors * Tr::kBlocks / groups))), unsigned(groups));
    EFFNET_LAUNCH((stem_kernel<Tr>), grid, dim3(kThreads), Tr::kSharedBytes, stream, p);
    p.x = static_cast<const char*>(p.x) + p.batch * x_bytes;
    p.y = static_cast<char*>(p.y) + p.batch * y_bytes;
    if (p.residual) p.residual = static_cast<const char*>(p.residual) + p.batch * y_bytes;
  }
}

template <typename T, bool kSilu> void choose_stem(const KernelParams& p, int multiprocessors, void* stream) {
  // Of 64, 48 and 32 channels a block the number that leaves least of K unused; of equals the largest.
  int best = 64;
  for (const int width : {48, 32})
    if (ceil_div(p.channels, width) * width < ceil_div(p.channels, best) * best) best = width;
  if (best == 64) return launch_stem<StemTraits<T, 4, kSilu>>(p, multiprocessors, stream);
  if (best == 48) return launch_stem<StemTraits<T, 3, kSilu>>(p, multiprocessors, stream);
  launch_stem<StemTraits<T, 2, kSilu>>(p, multiprocessors, stream);
}

// Starts the kernel for p.batch > 0 images on a GPU of that many multiprocessors: kernel 3, stride 2, in_channels at most 4,
// channels a multiple of 8; y and residual 16-byte aligned. The rest is of any alignment and x of any strides.
template <typename T> void launch_forward(const Params& given, int multiprocessors, void* stream) {
  KernelParams p{given};
  p.low = p.activation == Activation::identity ? -INFINITY : 0.f;
  p.high = p.activation == Activation::relu6 ? 6.f : INFINITY;
  if (p.activation == Activation::silu) return choose_stem<T, true>(p, multiprocessors, stream);
  choose_stem<T, false>(p, multiprocessors, stream);
}

}  // namespace effnet_fast::conv
