// One object for each EMULATED_TYPE. With ONE_WINDOW it has the tensor cores' kernel for 5x5, stride 1 and SiLU alone, which is
// soon compiled: for the seeded bugs.
#include "depthwise/forward.cuh"

#include "kernels.h"

template <typename T> void emulated::depthwise(const effnet_fast::depthwise::ForwardParams& p, int multiprocessors, unsigned seed) {
  using namespace effnet_fast::depthwise;
  emu::state().order.seed(seed);
#ifdef ONE_WINDOW
  choose_tensor<T, 5, 1, true>(KernelParams{p}, multiprocessors, nullptr);
#else
  launch_forward<T>(p, multiprocessors, nullptr);
#endif
}
template void emulated::depthwise<EMULATED_TYPE>(const effnet_fast::depthwise::ForwardParams&, int, unsigned);
