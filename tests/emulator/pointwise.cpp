// One object for each EMULATED_TYPE. With ONE_KERNEL it has that of a gate and at most 48 output channels alone, which is soon
// compiled: for a second type, and for changed sources.
#include "pointwise/forward.cuh"

#include "kernels.h"

template <typename T>
void emulated::pointwise(const effnet_fast::pointwise::Params& p, int multiprocessors, int shared_bytes, unsigned seed) {
  using namespace effnet_fast::pointwise;
  emu::state().order.seed(seed);
  const Gpu gpu{multiprocessors, shared_bytes, shared_bytes - 1024};
#ifdef ONE_KERNEL
  launch_tensor<Traits<T, 48, 4, 2, true, false>>(in_32_bits("", p), gpu, nullptr);
#else
  launch_forward<T>(p, gpu, nullptr);
#endif
}
template void emulated::pointwise<EMULATED_TYPE>(const effnet_fast::pointwise::Params&, int, int, unsigned);
