// One object for each EMULATED_TYPE.
#include "chain/chain.cuh"

#include "kernels.h"

template <typename T> void emulated::chain(const std::vector<effnet_fast::chain::Step>& steps, unsigned* barrier,
                                           int multiprocessors, int shared_bytes, unsigned seed) {
  emu::state().order.seed(seed);
  effnet_fast::chain::launch<T>(steps, barrier, multiprocessors, shared_bytes, nullptr);
}
template void emulated::chain<EMULATED_TYPE>(const std::vector<effnet_fast::chain::Step>&, unsigned*, int, int, unsigned);
