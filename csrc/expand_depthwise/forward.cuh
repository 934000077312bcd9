// Expansion and depthwise convolution in one kernel on CUDA, half types, channels_last:  h = act(norm(x W^T)),
// y = act(norm(conv(h, w))), and per-piece sums of y for the squeeze. h, the widest tensor of a network, never leaves the SM.
//
// It is the depthwise kernel on the tensor cores (../depthwise/forward_tensor.cuh: a block makes 32 columns x 48 channels, sliding
// down a segment of rows) with other rows. That kernel's come from memory by cp.async; these are made where they are wanted, a
// stage of kStageRows at a time: the block has x's rows of the stage in shared memory, all input channels of them, and W's 48
// rows. A warp makes 16 channels of 32 pixels at once (mma of 16 x 8 x 16), norm and activation on the way to shared memory. The
// zeros that pad h are no activations of zeros in x: pixels beyond the image are blanked after the activation.
// The next stage's x is under way while this one's h is convolved.
//
// Bytes an output: 2, and of x 2 stride^2 C / K from HBM and K / 48 times as many from L2; without this kernel 4 stride^2 + 2 and
// more. Operations: (1 + 2 / 32) stride^2 (C multiply-adds, norm, activation) for h, of which k - 1 columns of 32 and k - 1 rows of
// a segment are made twice; k^2 multiply-adds, norm and activation for y.
//
// From the SASS of sm_90 a bf16 h of 24 channels takes 9 lane-instructions, of which SiLU and the norm are 3.5, and an output then
// the 10 to 15 of the depthwise kernel. At the rate of instructions that this reaches on an H200, an instruction in 40 % of the
// clocks, 256 images of 144 channels of 56x56 would take 220 us; an H200 took 281, and the two kernels 280. It gains where few
// channels are convolved with stride 2 and L2 does not hold h: B5's 24 to 144 of 228x228, 64 images, 681 us for 993.
#pragma once
#include "../depthwise/forward.cuh"
#include "params.h"

namespace effnet_fast::expand_depthwise {

// W's rows and x's pixels are an odd number of 16-byte pieces apart, so that ldmatrix takes eight of them from all banks.
struct KernelParams : depthwise::KernelParams {
  Expansion expand;
  int pieces_a_pixel, pitch;  // or a row of W: of 16 bytes; bytes from one pixel to the next
  unsigned inverse;           // of pieces_a_pixel, by 2^32, rounded up; 0 where it is odd, as nothing lies between pixels then
};

// Makes h's rows, for depthwise::tensor_kernel.
template <class Tr> struct Expander {
  using Params = KernelParams;
  using T = typename Tr::T;
  static constexpr const char* kOp = "expand_depthwise_conv_bn_act";
  static constexpr int kStagePixels = Tr::kStageRows * Tr::kPixels;
  static constexpr int kTiles = ceil_div(kStagePixels, 32), kTilePixels = 32;  // a warp's at once
  // Behind what the depthwise kernel has: norm, W, x.
  static constexpr int kNormAt = Tr::kSharedBytes, kWeightAt = kNormAt + Tr::kChannels * int(sizeof(Affine));
  static int64_t shared_bytes(int64_t pitch) { return kWeightAt + (Tr::kChannels + kTiles * kTilePixels) * pitch; }

  const Params& p;
  int first_column, first_row, first_real, real_rows;

  __device__ __forceinline__ Expander(const Params& p_, int, int first_column_, int, int first_row_, int first_real_,
                                      int real_rows_)
      : p(p_),
        first_column(first_column_ * Tr::kStride - p_.pad_left),
        first_row(first_row_),
        first_real(first_real_),
        real_rows(real_rows_) {}
  // Worked out again at every use, as registers are short.
  static __device__ __forceinline__ int first_image() { return blockIdx.z * Tr::kStrips; }
  static __device__ __forceinline__ int block_channel() { return blockIdx.x * Tr::kChannels; }
  __device__ __forceinline__ bool is_real(int row) const { return unsigned(row - first_real) < unsigned(real_rows); }

  // Where the piece of that number lies, of pixels or rows one after another: exactly while that number times pieces_a_pixel is
  // below 2^32, which no shared memory comes near.
  __device__ __forceinline__ int place(int piece) const {
    const int pixel = int(uint64_t(unsigned(piece)) * p.inverse >> 32);
    return 16 * piece + (p.pitch - 16 * p.pieces_a_pixel) * pixel;
  }

  // x's pixels of rows row0 and on set out. A row's are one run of memory; what is no pixel is not copied.
  __device__ __forceinline__ void bring(int row0, Shared ring) const {
    const Shared x_at = ring + (kWeightAt + Tr::kChannels * p.pitch);
    const int first = max(0, -first_column) * p.pieces_a_pixel,
              last = min(Tr::kInColumns, p.width - first_column) * p.pieces_a_pixel;
#pragma unroll 1
    for (int line = 0; line < Tr::kStageRows * Tr::kStrips; ++line) {
      const int row = row0 + line / Tr::kStrips, image = first_image() + line % Tr::kStrips;
      if (!is_real(row) || image >= int(p.batch)) continue;
      const T* const from =
          static_cast<const T*>(p.x) + (image * p.x_image + (first_row + row) * p.x_row + first_column * p.x_pixel);
      const Shared to = x_at + line * Tr::kInColumns * p.pitch;
      for (int piece = first + int(threadIdx.x); piece < last; piece += Tr::kThreads)
        copy_async(to + place(piece), from + piece * 8, 16);
    }
    copy_async_commit();
  }
  __device__ __forceinline__ void begin(char* shared, Shared ring) const {
    bring(0, ring);
    const int rows = min(Tr::kChannels, p.channels - block_channel());
    const int64_t first = int64_t(block_channel()) * p.expand.in_channels;
    if (p.expand.weight_dtype == p.dtype) {
      const T* const from = static_cast<const T*>(p.expand.weight) + first;
#pragma unroll 1
      for (int piece = threadIdx.x; piece < rows * p.pieces_a_pixel; piece += Tr::kThreads)
        copy_async(ring + (kWeightAt + place(piece)), from + piece * 8, 16);
    } else {
#pragma unroll 1
      for (int pair = threadIdx.x; pair < rows * p.pieces_a_pixel * 4; pair += Tr::kThreads) {
        const auto value = [&](int i) { return load_float(p.expand.weight, p.expand.weight_dtype, first + 2 * pair + i); };
        *reinterpret_cast<uint32_t*>(shared + kWeightAt + place(pair / 4) + pair % 4 * 4) = round_pair<T>(value(0), value(1));
      }
    }
    copy_async_commit();
  }

  // The norm of this thread's channel, if it has one.
  __device__ __forceinline__ void store_norm(char* shared) const {
    if (threadIdx.x >= Tr::kChannels || block_channel() + int(threadIdx.x) >= p.channels) return;
    const Affine folded = fold_norm(p.expand, block_channel() + threadIdx.x);
    reinterpret_cast<Affine*>(shared + kNormAt)[threadIdx.x] = before_silu<T>(folded, Tr::kSilu);
  }

  __device__ __forceinline__ void next(int row0, const char* shared, Shared ring, int) const {
    copy_async_wait<0>();
    __syncthreads();  // x has landed for all; the rows before are done with, and what came of them is all there
    expand(row0, shared, ring);
    __syncthreads();  // h is there
    bring(row0 + Tr::kStageRows, ring);
  }

  __device__ __forceinline__ void expand(int row0, const char* shared, Shared ring) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp % Tr::kGroups;
    const int g = lane / 4, q = lane % 4;
    if (block_channel() + group * 16 >= p.channels) return;
    Vec<Affine, 2> norm[2];  // [j], of columns 2q and 2q + 1: channel 8j + 2q
#pragma unroll
    for (int j = 0; j < 2; ++j) norm[j] = load<2>(reinterpret_cast<const Affine*>(shared + kNormAt) + group * 16 + 8 * j + 2 * q);
    const Shared x_at = ring + (kWeightAt + Tr::kChannels * p.pitch);
    const Shared b_at = ring + (kWeightAt + (group * 16 + lane / 16 * 8 + lane % 8) * p.pitch + lane / 8 % 2 * 16);
    const int columns_first = max(0, -first_column), columns = max(0, p.width - first_column - columns_first);
    const Shared put = ring + (group * 2 + lane / 16) * 16;
    const int steps = p.expand.in_channels / 16;
#pragma unroll 1
    for (int tile = warp / Tr::kGroups; tile < kTiles; tile += 2) {
      // Each lane has a pixel to say of which image, row and column it is, and so where it goes; what is past the stage's pixels
      // goes where nobody looks.
      const int pixel = tile * kTilePixels + lane, line = pixel / Tr::kInColumns, column = pixel % Tr::kInColumns;
      const int row = line / Tr::kStrips, strip = line % Tr::kStrips;
      const bool within = unsigned(column - columns_first) < unsigned(columns) && first_image() + strip < int(p.batch);
      const unsigned real = __ballot_sync(0xffffffffu, pixel < kStagePixels && within && is_real(row0 + row));
      const int place = strip * Tr::kInColumns + (Tr::kStride == 2 ? column % 2 * Tr::kEven + column / 2 : column);
      const int mine = pixel < kStagePixels ? row * Tr::kRowBytes + place * Tr::kPixelBytes : Tr::kStageRows * Tr::kRowBytes;
      float acc[2][2][4] = {};
      if (real != 0) {
        const Shared a_at = x_at + ((tile * kTilePixels + lane % 16) * p.pitch + lane / 16 * 16);
#pragma unroll 2
        for (int step = 0; step < steps; ++step) {
          uint32_t a[2][4], b[4];
          load_matrices(b, b_at + step * 32);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            load_matrices(a[m], a_at + (m * 16 * p.pitch + step * 32));
#pragma unroll
            for (int j = 0; j < 2; ++j) mma_k16(T(), acc[m][j], a[m], b[2 * j], b[2 * j + 1]);
          }
        }
        if (p.expand.in_channels % 16) {  // 8 more: of what lies behind them nothing is used
          uint32_t a[4], b[4];
          load_matrices(b, b_at + (steps * 32 - lane / 8 % 2 * 16));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            load_matrices(a, a_at + (m * 16 * p.pitch + steps * 32 - lane / 16 * 16));
#pragma unroll
            for (int j = 0; j < 2; ++j) mma_k8(T(), acc[m][j], a[0], a[1], b[2 * j]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t packed[4];  // (pixels 0 to 7, j 0) (pixels 8 to 15, j 0) (pixels 0 to 7, j 1) (pixels 8 to 15, j 1)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = i / 2, half = i % 2;
          float v0 = acc[m][j][2 * half] * norm[j].at[0].scale + norm[j].at[0].shift;
          float v1 = acc[m][j][2 * half + 1] * norm[j].at[1].scale + norm[j].at[1].shift;
          if constexpr (Tr::kSilu) {
            silu_of_two<T>(v0, v1);
          } else {
            v0 = clamp(v0, p.low, p.high), v1 = clamp(v1, p.low, p.high);
          }
          packed[i] = real >> (m * 16 + half * 8 + g) & 1 ? round_pair<T>(v0, v1) : 0;
        }
        store_matrices(put + __shfl_sync(0xffffffffu, mine, m * 16 + lane % 16), packed);
      }
    }
  }
};

struct Gpu {
  int multiprocessors, block_shared_bytes;  // the latter: that a block may have
};

template <class Tr> void launch(const KernelParams& p, const Gpu& gpu, void* stream) {
  const int64_t bytes = Expander<Tr>::shared_bytes(p.pitch);
  if (bytes > gpu.block_shared_bytes) {
    throw std::runtime_error(std::string(Expander<Tr>::kOp) + ": " + std::to_string(p.expand.in_channels) +
                             " input channels take " + std::to_string(bytes) + " bytes of shared memory; this GPU has " +
                             std::to_string(gpu.block_shared_bytes));
  }
  depthwise::launch_tensor<Tr, Expander>(p, gpu.multiprocessors, stream, int(bytes), gpu.block_shared_bytes);
}

template <typename T, int K, int S, bool kSilu> void choose(const KernelParams& p, const Gpu& gpu, void* stream) {
  using depthwise::TensorTraits;
  if (p.out_width <= 8) return launch<TensorTraits<T, K, S, 8, 3, kSilu, true>>(p, gpu, stream);
  if (p.out_width <= 16) return launch<TensorTraits<T, K, S, 16, 3, kSilu, true>>(p, gpu, stream);
  launch<TensorTraits<T, K, S, 32, 3, kSilu, true>>(p, gpu, stream);
}

inline KernelParams kernel_params(const ForwardParams& given) {
  KernelParams p{{given}, given.expand};
  if (p.channels % 8 || p.expand.in_channels % 8) {
    throw std::runtime_error("expand_depthwise_conv_bn_act: the CUDA kernel takes C and K that are multiples of 8, got " +
                             std::to_string(p.expand.in_channels) + " and " + std::to_string(p.channels));
  }
  p.low = p.activation == Activation::identity ? -INFINITY : 0.f;
  p.high = p.activation == Activation::relu6 ? 6.f : INFINITY;
  p.pieces_a_pixel = p.expand.in_channels / 8;
  p.pitch = 16 * (p.pieces_a_pixel | 1);
  p.inverse = p.pieces_a_pixel % 2 ? 0 : unsigned(ceil_div(uint64_t(1) << 32, uint64_t(p.pieces_a_pixel)));
  return p;
}

// Starts the kernel for p.batch > 0 images. x, W and y must be 16-byte aligned, x's strides multiples of 16 bytes, partial 8-byte
// aligned.
template <typename T> void launch_forward(const ForwardParams& given, const Gpu& gpu, void* stream) {
  const KernelParams p = kernel_params(given);
  depthwise::with_window("expand_depthwise_conv_bn_act", p, [&](auto window) {
    constexpr int K = decltype(window)::kKernel, S = decltype(window)::kStride;
    if (p.activation == Activation::silu) return choose<T, K, S, true>(p, gpu, stream);
    choose<T, K, S, false>(p, gpu, stream);
  });
}

}  // namespace effnet_fast::expand_depthwise
