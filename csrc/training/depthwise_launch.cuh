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

// Calls f(instance). Images: all that is read and written.
template <typename T, class W, typename F>
void with_instance_of(const Depthwise& p, bool silu, std::initializer_list<const void*> images, const F& f) {
  bool aligned = p.channels * int64_t(sizeof(T)) % 16 == 0;
  for (const void* at : images) aligned = aligned && aligned16(at);
  if (!aligned) return f(Instance<T, W, false, false>{});
  return silu ? f(Instance<T, W, true, true>{}) : f(Instance<T, W, true, false>{});
}

template <typename T, class W>
void launch_stats(const Depthwise& p, const Stats& made, const Allocate& allocate, int multiprocessors, void* stream) {
  const Range range(p.read.activation);
  with_instance_of<T, W>(p, range.silu, {p.read.x, made.y}, [&](auto instance) {
    using Tr = StatsTraits<decltype(instance)>;
    const Cut cut = cut_of(p, p.out_width, p.out_height, Tr::kColumns, Tr::kVector, Tr::kLive, multiprocessors);
    float* const partial = allocate(int64_t(cut.pieces) * 3 * p.channels);
    const StatsLaunch launch{p, cut, range, made.y, partial};
    EFFNET_ALLOW_SHARED(depthwise_stats_kernel<Tr>, Tr::kSharedBytes);
    EFFNET_LAUNCH((depthwise_stats_kernel<Tr>), dim3(unsigned(ceil_div(p.channels, kTile)), unsigned(cut.pieces)), dim3(kThreads),
                  Tr::kSharedBytes, stream, launch);
    finish_stats(partial, cut.pieces, p.channels, made, stream);
  });
}

template <typename T, class W>
void launch_backward(const Depthwise& p, const Gradients& made, const Allocate& allocate, int multiprocessors, void* stream) {
  const Range range(p.read.activation), y_range(made.of_y.activation);
  with_instance_of<T, W>(
      p, range.silu && y_range.silu, {p.read.x, made.of_y.grad, made.of_y.y, made.residual, made.grad_x}, [&](auto instance) {
        using Tr = BackwardTraits<decltype(instance)>;
        const int width = p.width + p.pad_left - Tr::origin(p.pad_left), height = p.height + p.pad_top - Tr::origin(p.pad_top);
        const Cut cut = cut_of(p, width, height, Tr::kColumns, Tr::kVector, Tr::kBodyRows, multiprocessors);
        float* const partial = allocate(int64_t(cut.pieces) * Tr::kNumbers * p.channels);
        const BackwardLaunch launch{p, cut, range, y_range, made.of_y, made.residual, made.grad_x, partial};
        EFFNET_ALLOW_SHARED(depthwise_backward_kernel<Tr>, Tr::kSharedBytes);
        EFFNET_LAUNCH((depthwise_backward_kernel<Tr>), dim3(unsigned(ceil_div(p.channels, kTile)), unsigned(cut.pieces)),
                      dim3(kThreads), Tr::kSharedBytes, stream, launch);
        EFFNET_LAUNCH(finish_sums_kernel, dim3(unsigned(ceil_div(p.channels, kFinishChannels)), unsigned(Tr::kNumbers)),
                      dim3(kFinishChannels * kRows), kFinishChannels * kRows * sizeof(Sum), stream, partial, cut.pieces, p.channels,
                      made.sums, made.grad_weight);
      });
}

}  // namespace effnet_fast::training
