// Starts the CUDA kernel of gate.cuh.
#include <atomic>

#include "gate.cuh"

namespace effnet_fast::squeeze_excite {
namespace {

// Blocks of a cluster, of which code made for a compute capability below 9.0 knows nothing, wherever it runs.
int largest_cluster(int device) {
  static std::atomic<int> known[64] = {};  // by device; 0: not asked yet
  std::atomic<int>* const place = device < 64 ? &known[device] : nullptr;
  if (const int size = place ? place->load(std::memory_order_relaxed) : 0) return size;
  cudaFuncAttributes attributes;
  EFFNET_CUDA_CHECK(cudaFuncGetAttributes(&attributes, gate_kernel<float, 1>));
  const int size = attributes.ptxVersion >= 90 ? 8 : 1;
  if (place) place->store(size, std::memory_order_relaxed);
  return size;
}

}  // namespace

void gate_cuda(const GateParams& p, void* stream) {
  int device = 0, multiprocessors = 0;
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int cluster = largest_cluster(device);
  with_dtype(p.dtype, [&](auto type) { launch_gate<decltype(type)>(p, multiprocessors, cluster, stream); });
}

}  // namespace effnet_fast::squeeze_excite
