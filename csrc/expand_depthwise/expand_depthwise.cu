// Starts the CUDA kernels of forward.cuh.
#include "forward.cuh"

namespace effnet_fast::expand_depthwise {

void forward_cuda(const ForwardParams& p, void* stream) {
  int device = 0;
  Gpu gpu{};
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&gpu.block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (p.dtype == DType::bf16) {
    launch_forward<bf16>(p, gpu, stream);
  } else {
    launch_forward<fp16>(p, gpu, stream);
  }
  EFFNET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace effnet_fast::expand_depthwise
