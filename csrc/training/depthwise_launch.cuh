// How training's depthwise kernels are started, on a GPU of so many multiprocessors. `allocate` gives memory on the device for so
// many floats.
#pragma once
#include "depthwise_backward.cuh"
#include "depthwise_stats.cuh"

namespace effnet_fast::training {

template <typename F> void with_window(const Depthwise& p, const F& f) {
  const bool one = p.stride == 1;
  if (p.kernel == 3) return one ? f(Window<3, 1>{}) : f(Window<3, 2>{});
  return one ? f(Window<5, 1>{}) : f(Window<5, 2>{});
}

template <typename T, class W>
void launch_stats(const Depthwise& p, const Stats& made, const Allocate& allocate, int multiprocessors, void* stream) {
  using Tr = StatsTraits<T, W::kKernel, W::kStride>;
  const unsigned tiles = unsigned(ceil_div(p.channels, kLanes));
  const Cut cut = cut_of(p, p.out_width, p.out_height, Tr::kColumns, Tr::kLive, multiprocessors);
  float* const partial = allocate(int64_t(cut.pieces) * 3 * p.channels);
  const StatsLaunch launch{p, cut, Range(p.read.activation), made.y, partial};
  EFFNET_LAUNCH((depthwise_stats_kernel<Tr>), dim3(tiles, unsigned(cut.pieces)), dim3(kLanes * kWarps), Tr::kSharedBytes, stream,
                launch);
  EFFNET_LAUNCH(finish_stats_kernel, dim3(tiles), dim3(kLanes * kRows), kLanes * kRows * sizeof(Moments), stream, partial,
                cut.pieces, p.channels, made.mean, made.var);
}

template <typename T, class W>
void launch_backward(const Depthwise& p, const Gradients& made, const Allocate& allocate, int multiprocessors, void* stream) {
  using Tr = BackwardTraits<T, W::kKernel, W::kStride>;
  const unsigned tiles = unsigned(ceil_div(p.channels, kLanes));
  const int width = p.width + p.pad_left - Tr::origin(p.pad_left), height = p.height + p.pad_top - Tr::origin(p.pad_top);
  const Cut cut = cut_of(p, width, height, Tr::kColumns, Tr::kBodyRows, multiprocessors);
  float* const partial = allocate(int64_t(cut.pieces) * Tr::kNumbers * p.channels);
  const BackwardLaunch launch{p,           cut,    Range(p.read.activation), Range(made.of_y.activation), made.of_y, made.residual,
                              made.grad_x, partial};
  EFFNET_LAUNCH((depthwise_backward_kernel<Tr>), dim3(tiles, unsigned(cut.pieces)), dim3(kLanes * kWarps), Tr::kSharedBytes, stream,
                launch);
  EFFNET_LAUNCH(finish_sums_kernel, dim3(tiles, unsigned(Tr::kNumbers)), dim3(kLanes * kRows), kLanes * kRows * sizeof(float),
                stream, partial, cut.pieces, p.channels, made.sums, made.grad_weight);
}

}  // namespace effnet_fast::training
