// One object for each EMULATED_TYPE. With ONE_WINDOW it has its kernel for 5x5, stride 1, SiLU and an even C alone, which is soon
// compiled: for changed sources.
#include "depthwise/forward.cuh"

#include "kernels.h"

template <typename T> void emulated::depthwise(const effnet_fast::depthwise::ForwardParams& p, int multiprocessors, unsigned seed) {
  using namespace effnet_fast::depthwise;
  emu::state().order.seed(seed);
#ifdef ONE_WINDOW
  if constexpr (sizeof(T) == 2) {
    choose_tensor<T, 5, 1, true>(KernelParams{p}, multiprocessors, nullptr);
  } else {
    launch_direct<DirectTraits<T, 5, 1, 2>>(KernelParams{p}, multiprocessors, nullptr);
  }
#else
  launch_forward<T>(p, multiprocessors, nullptr);
#endif
}
template void emulated::depthwise<EMULATED_TYPE>(const effnet_fast::depthwise::ForwardParams&, int, unsigned);
