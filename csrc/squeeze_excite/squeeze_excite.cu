// Starts the CUDA kernels of gate.cuh.
#include "gate.cuh"

namespace effnet_fast::squeeze_excite {

void gate_cuda(const GateParams& p, void* stream) {
  if (shared_bytes(p) > 48 << 10) {
    throw std::runtime_error("squeeze_excite_gate: the CUDA kernel takes C + R <= 12288, got " +
                             std::to_string(int64_t(p.channels) + p.reduced));
  }
  int device = 0, multiprocessors = 0;
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  with_dtype(p.dtype, [&](auto type) { launch_gate<decltype(type)>(p, multiprocessors, stream); });
  EFFNET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace effnet_fast::squeeze_excite
