// One object for each EMULATED_TYPE. With ONE_KERNEL it has that of a gate and few output channels alone, which is soon compiled:
// for changed sources.
#include "training/pointwise_backward.cuh"

#include "kernels.h"
#include "pieces.h"

template <typename T> void emulated::pointwise_backward(const effnet_fast::training::Pointwise& p,
                                                        const effnet_fast::training::Gradients& made, int multiprocessors,
                                                        int shared_bytes, unsigned seed) {
  using namespace effnet_fast::training;
  emu::state().order.seed(seed);
  Pieces pieces;
  const effnet_fast::pointwise::Gpu gpu{multiprocessors, shared_bytes, shared_bytes - 1024};
#ifdef ONE_KERNEL
  start_backward<PointwiseBackward<T, Before::norm_and_gate, 2>>(launch_of(p, made), made, gpu, std::ref(pieces), nullptr);
#else
  launch_backward<T>(p, made, gpu, std::ref(pieces), nullptr);
#endif
}
template void emulated::pointwise_backward<EMULATED_TYPE>(const effnet_fast::training::Pointwise&,
                                                          const effnet_fast::training::Gradients&, int, int, unsigned);
