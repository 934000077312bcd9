// One object for bfloat16. With ONE_WINDOW it has its kernel for 3x3, stride 1, SiLU and wide images alone, which is soon compiled:
// for changed sources and the other type.
#include "expand_depthwise/forward.cuh"

#include "kernels.h"

template <typename T> void emulated::expand_depthwise(const effnet_fast::expand_depthwise::ForwardParams& p, int multiprocessors,
                                                      int shared_bytes, unsigned seed) {
  using namespace effnet_fast::expand_depthwise;
  emu::state().order.seed(seed);
#ifdef ONE_WINDOW
  launch<effnet_fast::depthwise::TensorTraits<T, 3, 1, 32, 3, true, true>>(kernel_params(p), {multiprocessors, shared_bytes},
                                                                           nullptr);
#else
  launch_forward<T>(p, {multiprocessors, shared_bytes}, nullptr);
#endif
}
template void emulated::expand_depthwise<EMULATED_TYPE>(const effnet_fast::expand_depthwise::ForwardParams&, int, int, unsigned);
