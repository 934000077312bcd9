// Starts the kernel of chain.cuh.
#include "chain.cuh"

namespace effnet_fast::chain {

int launch_cuda(const std::vector<Step>& steps, DType dtype, unsigned* barrier, void* stream) {
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (dtype == DType::bf16) {
    return launch<bf16>(steps, barrier, multiprocessors, shared_bytes, stream);
  }
  return launch<fp16>(steps, barrier, multiprocessors, shared_bytes, stream);
}

}  // namespace effnet_fast::chain
