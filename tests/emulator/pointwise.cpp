// One object for each EMULATED_TYPE.
#include "pointwise/forward.cuh"

#include "kernels.h"

template <typename T>
void emulated::pointwise(const effnet_fast::pointwise::Params& p, int multiprocessors, int shared_bytes, unsigned seed) {
  emu::state().order.seed(seed);
  effnet_fast::pointwise::launch_forward<T>(p, {multiprocessors, shared_bytes, shared_bytes - 1024}, nullptr);
}
template void emulated::pointwise<EMULATED_TYPE>(const effnet_fast::pointwise::Params&, int, int, unsigned);
