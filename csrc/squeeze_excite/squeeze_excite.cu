// Starts the CUDA kernel of gate.cuh.
#include "gate.cuh"

namespace effnet_fast::squeeze_excite {

void gate_cuda(const GateParams& p, void* stream) {
  int device = 0, multiprocessors = 0;
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  // Code made for a compute capability below 9.0 knows nothing of clusters, wherever it runs.
  const int cluster = compiled_for(gate_kernel<float, 1>) >= 90 ? 8 : 1;
  with_dtype(p.dtype, [&](auto type) { launch_gate<decltype(type)>(p, multiprocessors, cluster, stream); });
}

}  // namespace effnet_fast::squeeze_excite
