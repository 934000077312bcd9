// One object for each EMULATED_TYPE. With ONE_KERNEL it has that of a gate and at most 32 output channels alone, which is soon
// compiled: for changed sources.
#include "training/pointwise_stats.cuh"

#include "kernels.h"
#include "pieces.h"

template <typename T> void emulated::pointwise_stats(const effnet_fast::training::Pointwise& p,
                                                     const effnet_fast::training::Stats& made, int multiprocessors,
                                                     int shared_bytes, unsigned seed) {
  using namespace effnet_fast::training;
  emu::state().order.seed(seed);
  Pieces pieces;
  const effnet_fast::pointwise::Gpu gpu{multiprocessors, shared_bytes, shared_bytes - 1024};
#ifdef ONE_KERNEL
  launch_stats<PointwiseStats<T, 32, true, true>>(launch_of(p, made), made, gpu, std::ref(pieces), nullptr);
#else
  launch_stats<T>(p, made, gpu, std::ref(pieces), nullptr);
#endif
}
template void emulated::pointwise_stats<EMULATED_TYPE>(const effnet_fast::training::Pointwise&, const effnet_fast::training::Stats&,
                                                       int, int, unsigned);
