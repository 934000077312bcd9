// Depthwise convolution on CUDA, channels_last:  y = act(norm(conv(x, w))), and per-piece sums of y for the squeeze, in one launch
// and without atomics. Rows of x are read once a segment, but for columns that neighbours share.
//
//   tensor_kernel   half types, C a multiple of 8. For one tap, out[pixel][c] += x[pixel][c] * w[c] is a matrix product with a
//                   DIAGONAL B, whose A is 16 pixels x 8 channels exactly as NHWC stores them. Seven eighths of the products are
//                   by zero, and it is still cheaper than FFMA: one m16n8k16 is two taps of 128 outputs (0.125 lane-instructions
//                   an output and tap for FFMA's 1), halves need no unpacking, the weights of 8 channels take a thread one
//                   register. A block owns 32 columns x 48 channels (or 32 or 64) of a segment of rows, a warp 16 x 16 of them;
//                   rows come by cp.async, a stage of 3 to 6 at a time, 2 or 3 stages.
//   direct_kernel   fp32 and any C. A thread owns 2 channels (or 1) x 4 columns of a segment; FFMA; rows from global memory.
//
// Bytes an output: 2 or 4 times (stride^2 + 1); operations: k^2 multiply-adds, norm and activation. HBM binds: at 4.3 TB/s over 132
// SMs of 1.98 GHz a half output of stride 1 leaves 31 lane-instructions, one of stride 2 78, fp32 twice that. From the SASS of
// sm_90 the loop takes, with SiLU (tests/test_resources.py holds it to this):
//                    k3 s1    k3 s2    k5 s1    k5 s2
//   tensor_kernel     10.1     14.3     11.1     15.0     bf16; fp16 13.1, 16.9, 13.9, 18.0; registers <= 96 (k3), 168 (k5)
//   direct_kernel     24.4     32.1     41.4     50.0     fp32, 2 channels a thread; registers <= 128 (k3), 232 (k5)
// By those counts, which know no latency (effnet_fast/benchmark/kernel_time.py),
// a batch of 128 bf16 images runs at 87 % (B0) and 96 % (B5) of the rate that HBM alone allows for x and y.
//
// An H200 runs B0's shapes in bf16 at 40 to 75 % of that rate (benchmarks/results/kernels-cuda.json), wide images best. What it
// took for 32 channels of 112x112 k3s1 | 96 of 112x112 k3s2 | 144 of 56x56 k3s1 and k5s2 | 672 of 14x14 k5s1, 256 images, in us:
//   rows stored warp by warp, 32 bytes of each of 16 pixels at a time    165 | 345 | 191, 133 | 87
//   rows out block by block, as whole lines; stages without branches     159 | 328 | 193, 127 | 89
//   pixels in shared memory as in memory, not a plane for 8 channels     126 | 243 | 164,  96 | 85
// The planes made cp.async ask L2 for each 32 bytes by a request of their own, and for many twice, until L2's tag lookups were at
// 85 % of their peak and DRAM at 50 %. What binds now is latency: an instruction in 40 % of the clocks, warps waiting for fixed
// latencies, shared memory and barriers; 5x5, with 12 warps an SM, and images of 16 columns and fewer suffer most.
//
// What bought what, in lane-instructions an output of 5x5, stride 1: FFMA 45 (best of seven tilings) -> products with diag(w) by
// LDS.64 29.5 -> ldmatrix and stmatrix, an opaque shared base, late zeros 18.1 -> addresses pinned per lane 16 ->
// no branches in a stage without padding 13.9 -> bf16's SiLU by tanh 11.1.
// No gain: a reciprocal shared by two sigmoids (MUFU does not bind), several rounds of images a block to load weights once (20
// registers more), 8 channels a thread in FFMA (spills), launches that overlap (measured; griddepcontrol at the top of every kernel
// made B0 5 % slower at batch 256 and 15 % at batch 1). A run-time activation in tensor_kernel: 2 to 3 % more instructions, so
// SiLU and the clamps (relu, relu6, identity) are instances of their own.
//
// The norm is folded and the weight turned from [C][k k], of any type, in the prologue. Products with a diagonal have two traps: 0
// * inf is NaN, so an input that is not finite spoils the 8 channels of its group, and an output that overflows their sums; and
// tensor cores truncate fp32 sums, far below the precision of half storage. Both are why fp32 storage keeps to FFMA.
#pragma once
#include "forward_direct.cuh"
#include "forward_tensor.cuh"

namespace effnet_fast::depthwise {

constexpr const char* kOp = "depthwise_conv_bn_act";

template <int kKernel_, int kStride_> struct Window {
  static constexpr int kKernel = kKernel_, kStride = kStride_;
};

// Calls f with the Window of p's kernel and stride. `op` is who takes no others.
template <typename F> void with_window(const char* op, const ForwardParams& p, const F& f) {
  const bool one = p.stride == 1;
  if ((p.kernel != 3 && p.kernel != 5) || (p.stride != 1 && p.stride != 2)) {
    throw std::runtime_error(std::string(op) + ": the CUDA kernels take kernel 3 or 5 and stride 1 or 2, got kernel " +
                             std::to_string(p.kernel) + " and stride " + std::to_string(p.stride));
  }
  if (p.kernel == 3) return one ? f(Window<3, 1>{}) : f(Window<3, 2>{});
  return one ? f(Window<5, 1>{}) : f(Window<5, 2>{});
}

// Output rows of a segment. The caller's number of pieces says how many segments there are; without a squeeze there are as many as
// give every multiprocessor a block, the rule of effnet_fast/ops/depthwise/launch.py, which chooses the pieces.
inline int segment_rows(const char* op, const ForwardParams& p, int pieces_across, int64_t blocks_a_segment, int multiprocessors) {
  int64_t segments = p.pieces / pieces_across;
  if (p.pieces == 0) segments = min(max(multiprocessors / blocks_a_segment, int64_t(1)), int64_t(p.out_height));
  const int rows = segments > 0 ? int(ceil_div(p.out_height, segments)) : p.out_height;
  if (p.pieces != 0 && int64_t(ceil_div(p.out_height, rows)) * pieces_across != p.pieces) {
    throw std::runtime_error(std::string(op) + ": pieces is " + std::to_string(p.pieces) + "; for an output of " +
                             std::to_string(p.out_height) + " x " + std::to_string(p.out_width) + " a multiple of " +
                             std::to_string(pieces_across) + ", for segments of equally many rows, would do");
  }
  return rows;
}

// Starts the kernel for all images; one grid takes so many at most.
template <typename T, typename Params, typename Kernel>
void launch_in_chunks(Params p, int64_t images_a_grid, const Kernel& launch) {
  const int64_t batch = p.batch, y_image = int64_t(p.out_height) * p.out_width * p.channels;
  for (int64_t done = 0; done < batch; done += p.batch) {
    p.batch = min(batch - done, images_a_grid);
    launch(p);
    p.x = static_cast<const T*>(p.x) + p.batch * p.x_image;
    p.y = static_cast<T*>(p.y) + p.batch * y_image;
    if (p.partial) p.partial += p.batch * p.pieces * p.channels;
  }
}

constexpr int64_t kGridSide = 65535;  // of y and z

// With so many bytes of shared memory; the most that the same kernel may want is no less.
template <class Tr, template <class> class Rows = Loader> void launch_tensor(typename Rows<Tr>::Params p, int multiprocessors,
                                                                             void* stream, int bytes = Tr::kSharedBytes,
                                                                             int most_bytes = Tr::kSharedBytes) {
  const int strips = ceil_div(p.out_width, Tr::kStripColumns), tiles = ceil_div(p.channels, Tr::kChannels);
  const int64_t blocks = int64_t(tiles) * strips * ceil_div(p.batch, Tr::kStrips);
  p.segment = segment_rows(Rows<Tr>::kOp, p, ceil_div(p.out_width, kPieceColumns), blocks, multiprocessors);
  const int64_t rows = int64_t(ceil_div(p.out_height, p.segment)) * strips;
  if (rows > kGridSide || int64_t(p.out_width) * p.channels >= int64_t(1) << 31)
    throw std::runtime_error(std::string(Rows<Tr>::kOp) + ": the image is too large for one launch");
  EFFNET_ALLOW_SHARED((tensor_kernel<Tr, Rows>), most_bytes);
  launch_in_chunks<typename Tr::T>(p, kGridSide * Tr::kStrips, [&](const typename Rows<Tr>::Params& chunk) {
    const dim3 grid(unsigned(tiles), unsigned(rows), unsigned(ceil_div(chunk.batch, Tr::kStrips)));
    EFFNET_LAUNCH((tensor_kernel<Tr, Rows>), grid, dim3(Tr::kThreads), bytes, stream, chunk);
  });
}

template <class Tr> void launch_direct(KernelParams p, int multiprocessors, void* stream) {
  const int strips = ceil_div(p.out_width, Tr::kColumns);
  const int64_t threads_an_image = int64_t(strips) * (p.channels / Tr::kVector);
  p.segment = segment_rows(kOp, p, strips, ceil_div(p.batch * threads_an_image, Tr::kThreads), multiprocessors);
  const int segments = ceil_div(p.out_height, p.segment);
  const int64_t images_a_grid = (int64_t(1) << 31) / threads_an_image;  // thread numbers are 32 bits
  if (segments > kGridSide || images_a_grid == 0 || p.x_pixel >= int64_t(1) << 31)
    throw std::runtime_error(std::string(kOp) + ": the image is too large for one launch");
  EFFNET_ALLOW_SHARED(direct_kernel<Tr>, Tr::kSharedBytes);
  launch_in_chunks<typename Tr::T>(p, images_a_grid, [&](const KernelParams& chunk) {
    const dim3 grid(unsigned(ceil_div(chunk.batch * threads_an_image, Tr::kThreads)), unsigned(segments));
    EFFNET_LAUNCH((direct_kernel<Tr>), grid, dim3(Tr::kThreads), Tr::kSharedBytes, stream, chunk);
  });
}

// Channels a block of the tensor kernel: of 48, 64 and 32 the one that leaves least of C unused. 48 divides every expanded
// width, 6 x (a multiple of 8); the others matter to the first stage alone, so only its window has them.
inline int block_channels(int channels) {
  int best = 48;
  for (const int width : {64, 32})
    if (ceil_div(channels, width) * width < ceil_div(channels, best) * best) best = width;
  return best;
}

template <typename T, int K, int S, bool kSilu> void choose_tensor(const KernelParams& p, int multiprocessors, void* stream) {
  if (p.out_width <= 8) return launch_tensor<TensorTraits<T, K, S, 8, 3, kSilu>>(p, multiprocessors, stream);
  if (p.out_width <= 16) return launch_tensor<TensorTraits<T, K, S, 16, 3, kSilu>>(p, multiprocessors, stream);
  if constexpr (K == 3 && S == 1) {
    const int width = block_channels(p.channels);
    if (width == 32) return launch_tensor<TensorTraits<T, K, S, 32, 2, kSilu>>(p, multiprocessors, stream);
    if (width == 64) return launch_tensor<TensorTraits<T, K, S, 32, 4, kSilu>>(p, multiprocessors, stream);
  }
  launch_tensor<TensorTraits<T, K, S, 32, 3, kSilu>>(p, multiprocessors, stream);
}

// Starts the kernels for p.batch > 0 images on a GPU of that many multiprocessors. The weight must be 16-byte aligned; for half
// types and C % 8 == 0 so must be x, y and x's strides (in bytes), and partial 8-byte. All else needs no alignment.
template <typename T> void launch_forward(const ForwardParams& given, int multiprocessors, void* stream) {
  KernelParams p{given};
  p.low = p.activation == Activation::identity ? -INFINITY : 0.f;
  p.high = p.activation == Activation::relu6 ? 6.f : INFINITY;
  with_window(kOp, p, [&](auto window) {
    constexpr int K = decltype(window)::kKernel, S = decltype(window)::kStride;
    if constexpr (sizeof(T) == 2) {
      if (p.channels % 8 != 0) return launch_direct<DirectTraits<T, K, S, 1>>(p, multiprocessors, stream);
      if (p.activation == Activation::silu) return choose_tensor<T, K, S, true>(p, multiprocessors, stream);
      choose_tensor<T, K, S, false>(p, multiprocessors, stream);
    } else {
      const bool pairs = p.channels % 2 == 0 && (reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y)) % 8 == 0 &&
                         (p.x_image | p.x_row | p.x_pixel) % 2 == 0;
      if (pairs) return launch_direct<DirectTraits<T, K, S, 2>>(p, multiprocessors, stream);
      launch_direct<DirectTraits<T, K, S, 1>>(p, multiprocessors, stream);
    }
  });
}

}  // namespace effnet_fast::depthwise
