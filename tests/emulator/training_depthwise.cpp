// One object for each EMULATED_TYPE. With ONE_WINDOW it has 3x3, stride 1, alone, which is soon compiled: for changed sources.
#include "training/depthwise_launch.cuh"

#include "kernels.h"
#include "pieces.h"

namespace {

using namespace effnet_fast::training;

template <typename F> void with_compiled_window(const Depthwise& p, const F& f) {
#ifdef ONE_WINDOW
  f(Window<3, 1>{});
#else
  with_window(p, f);
#endif
}

}  // namespace

template <typename T> void emulated::depthwise_stats(const Depthwise& p, const Stats& made, int multiprocessors, unsigned seed) {
  emu::state().order.seed(seed);
  Pieces pieces;
  with_compiled_window(
      p, [&](auto window) { launch_stats<T, decltype(window)>(p, made, std::ref(pieces), multiprocessors, nullptr); });
}
template <typename T>
void emulated::depthwise_backward(const Depthwise& p, const Gradients& made, int multiprocessors, unsigned seed) {
  emu::state().order.seed(seed);
  Pieces pieces;
  with_compiled_window(
      p, [&](auto window) { launch_backward<T, decltype(window)>(p, made, std::ref(pieces), multiprocessors, nullptr); });
}
template void emulated::depthwise_stats<EMULATED_TYPE>(const Depthwise&, const Stats&, int, unsigned);
template void emulated::depthwise_backward<EMULATED_TYPE>(const Depthwise&, const Gradients&, int, unsigned);
