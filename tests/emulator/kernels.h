// What the binding (without sanitizers) calls of the emulated kernels (with them).
#pragma once
#include "chain/params.h"
#include "conv/params.h"
#include "depthwise/params.h"
#include "expand_depthwise/params.h"
#include "pointwise/params.h"
#include "squeeze_excite/params.h"
#include "training/params.h"

namespace emulated {

// Runs csrc/squeeze_excite/gate.cuh as on a GPU of that many multiprocessors and blocks a cluster, threads ordered by the seed.
void squeeze_excite_gate(const effnet_fast::squeeze_excite::GateParams& p, int multiprocessors, int largest_cluster, unsigned seed);

// Runs csrc/depthwise/forward.cuh for x of type T.
template <typename T> void depthwise(const effnet_fast::depthwise::ForwardParams& p, int multiprocessors, unsigned seed);

// Runs csrc/expand_depthwise/forward.cuh, for half types, on a GPU whose blocks may have so much shared memory.
template <typename T>
void expand_depthwise(const effnet_fast::expand_depthwise::ForwardParams& p, int multiprocessors, int shared_bytes, unsigned seed);

// Run csrc/training/depthwise_stats.cuh and depthwise_backward.cuh for x of type T.
template <typename T> void depthwise_stats(const effnet_fast::training::Depthwise& p, const effnet_fast::training::Stats& made,
                                           int multiprocessors, unsigned seed);
template <typename T> void depthwise_backward(const effnet_fast::training::Depthwise& p,
                                              const effnet_fast::training::Gradients& made, int multiprocessors, unsigned seed);

// Runs csrc/training/pointwise_stats.cuh, for half types, on a GPU whose multiprocessors have so much shared memory.
template <typename T> void pointwise_stats(const effnet_fast::training::Pointwise& p, const effnet_fast::training::Stats& made,
                                           int multiprocessors, int shared_bytes, unsigned seed);

// Runs csrc/training/pointwise_backward.cuh, likewise.
template <typename T> void pointwise_backward(const effnet_fast::training::Pointwise& p,
                                              const effnet_fast::training::Gradients& made, int multiprocessors, int shared_bytes,
                                              unsigned seed);

// Runs csrc/chain/chain.cuh, for half types, on a GPU whose blocks may have so much shared memory.
template <typename T> void chain(const std::vector<effnet_fast::chain::Step>& steps, unsigned* barrier, int multiprocessors,
                                 int shared_bytes, unsigned seed);

// Runs csrc/conv/forward.cuh.
void conv(const effnet_fast::conv::Params& p, int multiprocessors, unsigned seed);

// Runs csrc/squeeze_excite/squeeze_excite_cpu.cpp.
void squeeze_excite_gate_cpu(const effnet_fast::squeeze_excite::GateParams& p);

// Runs csrc/pointwise/forward.cuh, for half types, on a GPU whose multiprocessors have so much shared memory.
template <typename T> void pointwise(const effnet_fast::pointwise::Params& p, int multiprocessors, int shared_bytes, unsigned seed);

// Runs csrc/pointwise/pointwise_cpu.cpp.
void pointwise_cpu(const effnet_fast::pointwise::Params& p);

// Run csrc/depthwise/depthwise_cpu.cpp and csrc/conv/conv_cpu.cpp.
void depthwise_cpu(const effnet_fast::depthwise::ForwardParams& p);
void conv_cpu(const effnet_fast::conv::Params& p);

// A net of a stem, four blocks and a classifier, for images [3, height, width]. activation and dtype are numbers of their enums.
struct NetShape {
  int height, width, stem, channels, expanded, reduced, head, classes, activation, dtype;
};

// Runs csrc/inference/plan.cpp on so many images, and its kernels one by one. Both write [images, classes]. Returns the steps.
size_t plan_cpu(const NetShape& shape, int images, const char* x, char* planned, char* direct);

}  // namespace emulated
