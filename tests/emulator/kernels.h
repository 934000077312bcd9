// What the binding (without sanitizers) calls of the emulated kernels (with them).
#pragma once
#include "depthwise/params.h"
#include "squeeze_excite/params.h"

namespace emulated {

// Runs csrc/squeeze_excite/gate.cuh as on a GPU of that many multiprocessors, threads ordered by the seed.
void squeeze_excite_gate(const effnet_fast::squeeze_excite::GateParams& p, int multiprocessors, unsigned seed);

// Runs csrc/squeeze_excite/squeeze_excite_cpu.cpp.
void squeeze_excite_gate_cpu(const effnet_fast::squeeze_excite::GateParams& p);

// Runs csrc/depthwise/forward.cuh for x of type T.
template <typename T> void depthwise(const effnet_fast::depthwise::ForwardParams& p, int multiprocessors, unsigned seed);

}  // namespace emulated
