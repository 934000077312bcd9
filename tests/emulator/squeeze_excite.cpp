#include "squeeze_excite/gate.cuh"

#include "kernels.h"

void emulated::squeeze_excite_gate(const effnet_fast::squeeze_excite::GateParams& p, int multiprocessors, int largest_cluster,
                                   unsigned seed) {
  emu::state().order.seed(seed);
  effnet_fast::with_dtype(p.dtype, [&](auto type) {
    effnet_fast::squeeze_excite::launch_gate<decltype(type)>(p, multiprocessors, largest_cluster, nullptr);
  });
}
